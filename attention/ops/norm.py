"""Vectors brought to one root mean square.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019, arXiv 1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, eps: float, size: float) -> Tensor:
    """size x / sqrt(mean x^2 + eps), over the last dimension, in at least float32.

    As `rms_norm_reference`, with a backward pass of few sweeps over memory, which on a CPU are what it costs.
    """
    return _RmsNorm.apply(x.to(torch.promote_types(x.dtype, torch.float32)), eps, size)


def rms_norm_reference(x: Tensor, eps: float, size: float) -> Tensor:
    """The definition, by ordinary autograd."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return size * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


class _RmsNorm(torch.autograd.Function):
    """With f = size / sqrt(mean x^2 + eps), y = f x: dx = f (dy - y mean(y dy) / size^2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, size: float) -> Tensor:
        factor = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_().mul_(size)
        y = x * factor
        ctx.save_for_backward(y, factor)
        ctx.size = size
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        y, factor = ctx.saved_tensors
        along = (dy * y).mean(-1, keepdim=True) / -(ctx.size**2)
        return torch.addcmul(dy, y, along).mul_(factor), None, None
