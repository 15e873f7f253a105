"""Configuration, model, training, evaluation, generation, checkpoints and costs."""

__version__ = "0.1.0"
