"""Projections of tokens by the heads that chose them, and back: work for (token, head) pairs that were chosen only.

Legend of shapes: B batch, T tokens, H heads, D head width, d model width; n tokens in the longest list of a head in a
row of the batch, to which the others are padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Chosen:
    """For each head the list of its tokens, in their order.

    index [B, H, n] int64: the tokens of each list, 0..T-1; -1 behind its end.
    rows, places: for each head the same without padding, over the whole batch: where its tokens stand in [B T, ..],
    and where in [B n, ..].
    """

    index: Tensor
    rows: tuple[Tensor, ...]
    places: tuple[Tensor, ...]

    @staticmethod
    def of(mask: Tensor) -> Chosen:
        """The lists of a mask [B, H, T]; waits for the device, since shapes depend on it."""
        length = mask.shape[2]
        counts = mask.sum(2)
        longest, of_head = int(counts.max()), counts.sum(0).tolist()
        head, row, token = mask.transpose(0, 1).nonzero(as_tuple=True)
        place = (mask.cumsum(2) - 1)[row, head, token]
        index = token.new_full((*mask.shape[:2], longest), -1)
        index[row, head, place] = token
        rows, places = (row * length + token).split(of_head), (row * longest + place).split(of_head)
        return Chosen(index, rows, places)


def gather_project(x: Tensor, weight: Tensor, chosen: Chosen) -> Tensor:
    """x [B, T, d] times weight [H, d, D], for the tokens of each head's list: [B, H, n, D], 0 behind its end."""
    out = _GatherProject.apply(x.flatten(0, 1), weight, chosen)
    return out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def scatter_project(y: Tensor, weight: Tensor, chosen: Chosen, length: int) -> Tensor:
    """y [B, H, n, D] times weight [H, D, d], each added to its token, summed over heads: [B, length, d].

    What stands behind the end of a list is ignored. Sums are float32 or wider, and of the same order always.
    """
    rows = y.shape[0] * length
    out = _ScatterProject.apply(y.transpose(1, 2).flatten(0, 1), weight, chosen, rows)
    return out.unflatten(0, (y.shape[0], length))


# The two are each other's backward pass. Head by head: no copy of x for each head is kept, and since a token comes at
# most once in a list, no sum depends on the order in which threads arrive.


def _gather(x: Tensor, weight: Tensor, chosen: Chosen) -> Tensor:
    """x [B T, d], weight [H, d, D] -> [B n, H, D]."""
    batch, heads, longest = chosen.index.shape
    out = x.new_zeros(batch * longest, heads, weight.shape[2])
    for head, (rows, places) in enumerate(zip(chosen.rows, chosen.places, strict=True)):
        out[:, head].index_copy_(0, places, x.index_select(0, rows) @ weight[head])
    return out


def _scatter(y: Tensor, weight: Tensor, chosen: Chosen, num_rows: int) -> Tensor:
    """y [B n, H, D], weight [H, D, d] -> [B T, d]."""
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.new_zeros(num_rows, weight.shape[2], dtype=wide)
    for head, (rows, places) in enumerate(zip(chosen.rows, chosen.places, strict=True)):
        out.index_add_(0, rows, (y[:, head].index_select(0, places) @ weight[head]).to(wide))
    return out.to(y.dtype)


def _weight_gradient(x: Tensor, y: Tensor, chosen: Chosen) -> Tensor:
    """x [B T, d], y [B n, H, D] -> [H, d, D]."""
    pairs = zip(chosen.rows, chosen.places, strict=True)
    return torch.stack([x.index_select(0, r).T @ y[:, h].index_select(0, p) for h, (r, p) in enumerate(pairs)])


class _GatherProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, chosen: Chosen) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.chosen = chosen
        return _gather(x, weight, chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = _scatter(grad, weight.transpose(1, 2), ctx.chosen, x.shape[0])
        return dx, _weight_gradient(x, grad, ctx.chosen), None


class _ScatterProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, chosen: Chosen, num_rows: int) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.chosen = chosen
        return _scatter(y, weight, chosen, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weight = ctx.saved_tensors
        dy = _gather(grad, weight.transpose(1, 2), ctx.chosen)
        return dy, _weight_gradient(grad, y, ctx.chosen).transpose(1, 2), None, None
