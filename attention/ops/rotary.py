"""Rotary position embedding: angles from the positions given, precise at any position."""

from typing import Any

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, base: float, fraction: float = 1.0) -> Tensor:
    """`x` rotated by its positions (RoFormer, eq. 34, with the pairs (j, j + D_rot / 2)).

    x [B, H, T, D]; positions integer: [T], [B or 1, T] (all heads alike) or [B or 1, H or 1, T]. The angle of
    pair j at position p is p * base^(-2j / D_rot). Only the first D_rot = fraction * D features rotate.
    Returns [B, H, T, D] in x's type. Raises ValueError where D_rot is not an even number of features.
    """
    return apply_rotary(x, rotary_table(positions, rotary_dim(x.shape[-1], fraction), base))


def rotary_dim(dim: int, fraction: float) -> int:
    """Number of features that rotate, out of `dim`."""
    rotated = round(dim * fraction)
    if not 0 < fraction <= 1 or rotated % 2 or rotated == 0:
        raise ValueError(f"fraction: {fraction} of {dim} features must be an even number of at least 2, got {rotated}")
    return rotated


def rotary_table(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), float64 [..., T, dim / 2], of the angles at `positions` [..., T], for all layers of a forward.

    Float64 always: in float32 an angle is off by 0.03 at position 1M and by 1 at 16M. `apply_rotary` rounds.
    """
    if base <= 1:
        raise ValueError(f"base: expected a number above 1, got {base}")
    pair = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[..., None] * base ** (-2.0 * pair / dim)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`x` [B, H, T, D] rotated by a `rotary_table` of [T], [B or 1, T] or [B or 1, H or 1, T] positions.

    The table's width says how many features rotate; the rest pass. Computed in at least float32, returned in
    x's type.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(wide).unsqueeze(1) if t.dim() == 3 else t.to(wide) for t in table)
    # Not `broadcast_shapes`: it imports sympy, half a second of every start.
    like, _ = torch.broadcast_tensors(x[..., :1], cos[..., :1])
    x = x.expand(*like.shape[:-1], x.shape[-1])
    return _turned(x, cos, sin) if torch.compiler.is_compiling() else _Turn.apply(x, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition; a compiler makes one pass of it."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype), x[..., 2 * half :]
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), rest], -1)


class _Turn(torch.autograd.Function):
    """`_turned`, written half by half into its place: products, sums and halves as tensors of their own would take
    three times as long. The gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = cos.shape[-1]
        first, second = (part.to(cos.dtype) for part in (x[..., :half], x[..., half : 2 * half]))
        turned = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
        torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1.0)
        torch.mul(second, cos, out=turned[..., half : 2 * half]).addcmul_(first, sin)
        turned[..., 2 * half :] = x[..., 2 * half :]
        return turned.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Turn.apply(grad, cos, -sin), None, None
