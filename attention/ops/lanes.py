"""Attention inside lanes: tokens sorted by (document, lane, time), a query meeting only what stands in its own lane.

A lane is any class of tokens: a residue of the position (Sparse Transformer, strided: Child et al., arXiv 1904.10509),
a column (Combiner, axial: Ren et al., arXiv 2107.05768), a cluster (Routing Transformer: Roy et al., arXiv
2003.05997). In this order the keys of a query lie side by side, and a rank serves as time.

Legend of shapes: B batch, H query heads, G key heads, Nk keys, Nq queries, which are the last of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.lifetimes import FOREVER, Lifetimes
from attention.ops.attend import attend
from attention.ops.attend_plan import FEW_QUERIES


@dataclass(frozen=True, eq=False)
class Permutation:
    """An order of n items: int64 [B or 1, G or 1, n], the number of the item at each place; and the place of each."""

    order: Tensor
    inverse: Tensor

    @staticmethod
    def of(order: Tensor) -> Permutation:
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return Permutation(order, torch.empty_like(order).scatter_(-1, order, places))

    def apply(self, x: Tensor) -> Tensor:
        """x [B, heads, n, ...] in this order; head h of x follows group h // (heads / G)."""
        return _Permute.apply(x, self.order, self.inverse)

    def undo(self, x: Tensor) -> Tensor:
        """The reverse of `apply`."""
        return _Permute.apply(x, self.inverse, self.order)


@dataclass(frozen=True, eq=False)
class Lanes:
    """The joint order of keys and queries.

    keys: None where they stay as they are given; life: of the keys in their new order, in ranks, int32
    [B or 1, G or 1, Nk]; time: rank of each query in its new order, int32 [B or 1, G or 1, Nq]; None = 0..Nq-1.
    """

    keys: Permutation | None
    queries: Permutation
    life: Lifetimes
    time: Tensor | None


def make_lanes(
    lane: Tensor,
    start: Tensor,
    *,
    queries: int | None = None,
    window: int | None = None,
    limit: tuple[Tensor, int] | None = None,
    strict: bool = False,
) -> Lanes:
    """Sort keys into lanes by (document, lane, time).

    lane      int64 [B or 1, G or 1, Nk], 0 <= lane < 2^31, of keys given in the order of time
    start     int64 [B or 1, G or 1, Nk]: when the key's document began. A dead row or padding of a cache has
              FOREVER: a document in which nobody asks
    queries   how many of the last keys are queries, too; default all. Those before them are rows of a cache
    window    ranks for which a key lives, its own included; default: to the end of its lane
    limit     the times of the keys, int64 [B or 1, G or 1, Nk], and for how many steps of time a key lives at most
    strict    a query does not meet its own key
    """
    # The stable sort keeps time as the third criterion; 2^31 (2^31 - 1) + 2^31 is the largest number here.
    group = (start << 31) + lane
    order = group.argsort(dim=-1, stable=True)
    keys = Permutation.of(order)
    rank = torch.arange(order.shape[-1], device=order.device)
    group = group.gather(-1, order)
    end = _run_ends(group)
    death = end if window is None else torch.minimum(end, rank + window)
    if limit is not None:
        time = limit[0].expand(order.shape).gather(-1, order)
        death = torch.minimum(death, _outlived(end, time, limit[1]))
    birth = (rank + strict)[None, None]
    life = Lifetimes(birth.to(torch.int32), death.to(torch.int32))
    if queries is None or queries == order.shape[-1]:
        return Lanes(keys, keys, life, None)
    place = keys.inverse
    time, asked = place[..., order.shape[-1] - queries :].sort(-1)
    mine, time = Permutation.of(asked), time.to(torch.int32)
    if queries > FEW_QUERIES:
        return Lanes(keys, mine, life, time)
    # So few look at all rows anyhow: to move these would take longer.
    return Lanes(None, mine, Lifetimes((place + strict).to(torch.int32), life.death.gather(-1, place)), time)


def attend_lanes(q: Tensor, k: Tensor, v: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor]:
    """`attend` of q [B, H, Nq, D] to k [B, G, Nk, D] and v [B, G, Nk, Dv] inside the lanes.

    Returns (out [B, H, Nq, Dv], lse [B, H, Nq]) in the order in which q was given.
    """
    time = lanes.time
    if time is not None and time.shape[1] > 1:
        time = time.repeat_interleave(q.shape[1] // time.shape[1], 1)
    mine = lanes.queries
    if lanes.keys is not None:
        k, v = lanes.keys.apply(k), lanes.keys.apply(v)
    out, lse = attend(mine.apply(q), k, v, lanes.life, time=time)
    return mine.undo(out), mine.undo(lse)


def met_by(lanes: Lanes, first: int, stop: int) -> Tensor:
    """Which keys the queries numbered first..stop-1 meet, bool [B or 1, G or 1, Nk]; of lanes in which all ask."""
    assert lanes.keys is not None
    order, life = lanes.keys.order, lanes.life
    asking = F.pad(((first <= order) & (order < stop)).cumsum(-1), (1, 0))
    before, until = (asking.gather(-1, rank.expand(order.shape).long()) for rank in (life.birth, life.death))
    return (before < until).gather(-1, lanes.keys.inverse)


def _run_ends(group: Tensor) -> Tensor:
    """For each place of the sorted groups [..., n]: one past the last place of its run of equals."""
    count = group.shape[-1]
    last = torch.ones_like(group, dtype=torch.bool)
    last[..., :-1] = group[..., 1:] != group[..., :-1]
    ends = torch.where(last, torch.arange(1, count + 1, device=group.device), count)
    return ends.flip(-1).cummin(-1).values.flip(-1)


def _outlived(end: Tensor, time: Tensor, limit: int) -> Tensor:
    """For each place the first one of its run (which ends at `end`) whose time is `limit` or more later, else `end`."""
    run = end << 31
    return torch.searchsorted(run + time, run + (time + limit).clamp(max=FOREVER))


class _Permute(torch.autograd.Function):
    """Of a permutation the gradient is the inverse one: a gather, not the slow sum that autograd's would be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return _gather(x, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """x [B, heads, n, ...] by order [B or 1, G or 1, n], in the memory layout of x if that is contiguous."""
    (batch, heads, count), groups = x.shape[:3], order.shape[1]
    by_token = x.transpose(1, 2)
    if groups == 1 and by_token.is_contiguous():  # the heads of a token lie side by side, so they move together
        return _gather_rows(by_token, order[:, 0].expand(batch, count)).transpose(1, 2)
    order = order.repeat_interleave(heads // groups, 1).expand(batch, heads, count)
    return _gather_rows(x.flatten(0, 1), order.flatten(0, 1)).unflatten(0, (batch, heads))


def _gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """x [lists, n, ...] by order [lists, n]."""
    lists, count = order.shape
    index = order + torch.arange(0, lists * count, count, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, (lists, count))
