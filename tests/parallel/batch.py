"""The batches on which engines are compared with each other: small, learnable, and unevenly labelled."""

import torch
from torch import Tensor

STEPS, ROWS, LENGTH, VOCABULARY = 20, 4, 16, 11


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Rows [ROWS, LENGTH] and their labels: as many scored as chance has it, and none at all in row 1."""
    generator = torch.Generator().manual_seed(step % 2)  # few, so that they can be learnt
    text = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    labels = text[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[1] = -100
    labels[3, 2:] = -100
    return text[:, :-1], labels
