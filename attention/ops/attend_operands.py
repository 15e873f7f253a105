"""What goes into `attend` and comes out of its backward pass, for every path alike.

Legend of shapes: B examples, H query heads, G key heads, Nq queries, Nk keys, D and Dv widths of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operands:
    """q [B, H, Nq, D], k [B, G, Nk, D], v [B, G, Nk, Dv]; bias and u [B, G, Nk], tau [B, H, Nq], or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    u: Tensor | None
    tau: Tensor | None
    scale: float

    @property
    def wide(self) -> torch.dtype:
        """What logits, weights and sums are computed in: at least float32."""
        return torch.promote_types(self.q.dtype, torch.float32)


@dataclass(frozen=True)
class Gradients:
    """In the shapes of the operands, that of k without columns that want none; q, k, v in their type, the others in at
    least float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    u: Tensor | None
    tau: Tensor | None

    @staticmethod
    def empty(x: Operands, wants_bias: bool = True, fixed: int = 0) -> Gradients:
        """To be filled, that of k without its last `fixed` columns; those of q, k, v with heads behind tokens in
        memory."""
        bias, width = x.bias if wants_bias else None, x.k.shape[-1] - fixed
        return Gradients(
            *(empty_heads_last(t, n) for t, n in ((x.q, x.q.shape[-1]), (x.k, width), (x.v, x.v.shape[-1]))),
            *(None if t is None else empty_heads_last(t, dtype=x.wide) for t in (bias, x.u, x.tau)),
        )

    @property
    def given(self) -> list[Tensor]:
        """Those that are not None, in order."""
        return [t for t in (self.q, self.k, self.v, self.bias, self.u, self.tau) if t is not None]


def row_terms(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(delta, lse) [B, H, Nq] of the backward pass: delta = sum(out * dout) - dlse, lse as its exponent needs it.

    Who met nobody has weights exp(-inf) = 0, and gradients of 0 even where that of its lse is not finite: its lse
    becomes +inf, its delta 0.
    """
    delta = (out.to(wide) * dout.to(wide)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    empty = lse == -torch.inf
    return delta.masked_fill(empty, 0.0), lse.masked_fill(empty, torch.inf)


def empty_heads_last(like: Tensor, *width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [B, heads, n, *width] in the memory layout [B, n, heads, *width]."""
    batch, heads, length = like.shape[:3]
    return like.new_empty(batch, length, heads, *width, dtype=dtype).transpose(1, 2)


def heads_last(x: Tensor) -> Tensor:
    """`x` [B, heads, n, ...] in the memory layout [B, n, heads, ...], copied unless it has it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
