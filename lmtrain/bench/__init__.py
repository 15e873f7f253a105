"""`lmtrain bench`: time and memory of mixers against length on the user's own device, beside honest baselines.

An `order` says what to measure; `subjects` (and `flex`) are what is measured; `run` does it, length by length, by
means of `measure`; `results`, `curves` and `verdict` say what follows; `tiles` counts what tiling costs; `text`,
`report` and `plot` show and keep it all. `tune` is another thing: it finds settings of the kernels.
"""
