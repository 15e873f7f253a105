"""`lmtrain bench`: time and memory of mixers against length on the user's own device, beside honest baselines.

An order says what to measure (`order`); subjects are what is measured (`subjects`, `flex`); `run` measures them
length by length (`measure`); `results`, `curves` and `verdict` say what follows; `tiles` counts what tiling costs;
`report` and `plot` show and keep it all.
"""
