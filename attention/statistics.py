"""Numbers worth watching that several mixers report. docs/watching.md says what each tells, and what to do about it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(p: Tensor) -> Tensor:
    """Entropy of the probabilities p [..., n] as a share of the most it can be: 1 if all are alike (or n = 1), 0 if
    one is certain; [...]."""
    number = p.shape[-1]
    return torch.special.entr(p).sum(-1) / math.log(number) if number > 1 else torch.ones_like(p[..., 0])


def binary_entropy(p: Tensor) -> Tensor:
    """Entropy of each decision that is yes with probability p, in bits: 1 if it is open, 0 if it is certain."""
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)


def share(yes: Tensor) -> Tensor:
    """How many of the answers (bool) are yes: a scalar from 0 to 1."""
    return yes.float().mean()
