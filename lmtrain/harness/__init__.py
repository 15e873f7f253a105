"""lm-evaluation-harness on our checkpoints: `python -m lmtrain.harness` is its command line with our model."""
