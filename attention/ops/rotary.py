"""Rotary position embedding: angles from the positions given, precise at any position."""

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
    half = cos.shape[-1]
    first, second, rest = x[..., :half].to(wide), x[..., half : 2 * half].to(wide), x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], -1)
