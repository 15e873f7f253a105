"""A sequence shard: the slice of a row's tokens that one of several processes has, and how rows of numbers cross.

What came before a shard lies on the lower ranks. Mixers ask for the part of it that their queries can meet: keys that
outlive their shard, states of scans, counts. Who needs what follows, on every rank alike, from the clock of the whole
row or from scores that all ranks have; so nobody asks for sizes, and nothing crosses that nobody meets.

Legend of shapes: B batch, G heads, n rows of a rank, N rows of all lower ranks, m places for those that come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from attention.lifetimes import Lifetimes


class Shard(Protocol):
    """Which slice of a row this process has; by `exchange` all processes of the row talk, all at the same time.

    rank: of this process; lengths: tokens of each rank, in their order. One object may serve all steps.
    """

    @property
    def rank(self) -> int: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    def exchange(self, rows: Tensor, send: Sequence[Tensor], receive: Sequence[int]) -> Tensor:
        """Rows [n, w] to every rank, the ones numbered in `send` (int64, each at most once), and what they send here.

        Returns [sum of receive, w], rank by rank; `receive` says how many come from each. Differentiable in rows: the
        gradients travel back, and those of a row are summed in at least float32.
        """


def bounds(shard: Shard, rank: int) -> tuple[int, int]:
    """The times of the first token of a rank, and of the one behind its last."""
    ends = list(accumulate(shard.lengths))
    return ends[rank] - shard.lengths[rank], ends[rank]


def alive_in(shard: Shard, life: Lifetimes, rank: int) -> Tensor:
    """Which keys are alive at the time of some token of the rank; bool [B or 1, G or 1, n]."""
    first, stop = bounds(shard, rank)
    return life.birth.clamp(min=first) < life.death.clamp(max=stop)


def gather_tokens(shard: Shard, x: Tensor, dim: int) -> Tensor:
    """x of the whole row, from each rank's x of its own tokens, which stand along `dim`. Differentiable."""
    rows = x.movedim(dim, 0)
    everything = torch.arange(len(rows), device=x.device)
    ranks = len(shard.lengths)
    whole = shard.exchange(rows.reshape(len(rows), -1), [everything] * ranks, shard.lengths)
    return whole.view(-1, *rows.shape[1:]).movedim(0, dim)


def to_higher(shard: Shard, parts: Sequence[Tensor]) -> Tensor:
    """What each lower rank has for this one, [ranks below, ...], from what this one has for each higher rank, or, if it
    is one tensor, for all of them; the last rank's stays here. All have one shape. Differentiable.
    """
    ranks = range(len(shard.lengths))
    rows = torch.stack(list(parts))
    number = torch.arange(len(rows), device=rows.device)
    part = [min(max(other - shard.rank - 1, 0), len(rows) - 1) for other in ranks]
    send = [number[part[other] : part[other] + (other > shard.rank)] for other in ranks]
    got = shard.exchange(rows.flatten(1), send, [int(other < shard.rank) for other in ranks])
    return got.view(-1, *rows.shape[1:])


@torch.no_grad()
def mean_of_ranks(shard: Shard, x: Tensor) -> Tensor:
    """The mean over all tokens of the row, from each rank's mean over its own. No gradient."""
    everybody = [torch.zeros(1, dtype=torch.int64, device=x.device)] * len(shard.lengths)
    means = shard.exchange(x.reshape(1, -1), everybody, [1] * len(shard.lengths))
    weights = torch.tensor(shard.lengths, dtype=x.dtype, device=x.device) / sum(shard.lengths)
    return (weights[:, None] * means).sum(0).view(x.shape)


def tied(y: Tensor, received: Tensor) -> Tensor:
    """y, unchanged, whose backward pass also goes back to what was received, with a gradient of 0.

    A rank that has no use for it still has to take part in the way back.
    """
    return _Tied.apply(y, received)


@dataclass(frozen=True, eq=False)
class Travel:
    """Which rows [B, G, n, w] of each rank go to which higher ones.

    send, receive: see `Shard.exchange`; place int64: where each row that comes stands among B G m; index int64
    [B or 1, G or 1, m]: its number among the N rows of all lower ranks, -1 for padding.
    """

    send: list[Tensor]
    receive: list[int]
    place: Tensor
    index: Tensor

    @staticmethod
    def of(shard: Shard, rows: Tensor, needed: Callable[[int, int], Tensor], *, front: bool = False) -> Travel:
        """rows: those of this rank [B, G, n, w], or any others of their B, G and device. needed(source, target): which
        rows of one rank a higher one needs, bool [B or 1, G or 1, n of the source].

        Rows of a list come in order of (rank, number); shorter lists are filled up behind, or in `front`.
        """
        rank, ranks, device = shard.rank, len(shard.lengths), rows.device
        batch, heads = rows.shape[:2]

        def everywhere(mask: Tensor) -> Tensor:
            return mask.expand(batch, heads, -1)

        masks = [needed(source, rank) for source in range(rank)]
        send = [everywhere(needed(rank, other)).flatten().nonzero()[:, 0] for other in range(rank + 1, ranks)]
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        lists = common_lists(masks)
        none = torch.zeros(*lists, 0, dtype=torch.bool, device=device)
        here = torch.cat([none, *(mask.expand(*lists, -1) for mask in masks)], 2)
        count = here.sum(2, keepdim=True)
        most = int(count.max())
        slot = here.cumsum(2) - 1 + (most - count if front else 0)
        number = torch.arange(here.shape[2], device=device).expand_as(here)
        index = torch.full((*lists, most + 1), -1, dtype=torch.int64, device=device)
        index.scatter_(2, torch.where(here, slot, most), number)  # who does not come goes to a last column
        # Rows come rank by rank, and of each rank list by list.
        list_number = torch.arange(batch * heads, device=device).view(batch, heads, 1)
        places = everywhere(slot) + list_number * most
        parts = places.split([mask.shape[2] for mask in masks], 2) if masks else []
        place = [part[everywhere(mask)] for part, mask in zip(parts, masks, strict=True)]
        receive = [len(one) for one in place] + [0] * (ranks - rank)
        return Travel([nothing] * (rank + 1) + send, receive, torch.cat([nothing, *place]), index[..., :most])

    @staticmethod
    def of_living(shard: Shard, rows: Tensor, lives: Sequence[Lifetimes], *, front: bool = False) -> Travel:
        """rows, front: as of `of`; lives: of the rows of each rank. A key goes where it is alive."""
        return Travel.of(shard, rows, lambda source, rank: alive_in(shard, lives[source], rank), front=front)

    def bring(self, shard: Shard, rows: Tensor) -> Tensor:
        """What the lower ranks send of their rows, [B, G, m, w]; padding is 0."""
        batch, heads, _, width = rows.shape
        got = shard.exchange(rows.flatten(0, 2), self.send, self.receive)
        most = self.index.shape[2]
        empty = got.new_zeros(batch * heads * most, width)
        return empty.index_copy(0, self.place, got).view(batch, heads, most, width)

    def put_in_front(self, shard: Shard, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k [B, G, n, D] and v [B, G, n, Dv] of this rank, in front of each what the lower ranks send of theirs, in one
        message."""
        came = self.bring(shard, torch.cat([k, v], -1)).split([k.shape[-1], v.shape[-1]], -1)
        return torch.cat([came[0], k], 2), torch.cat([came[1], v], 2)

    def take(self, values: Tensor, fill: int) -> Tensor:
        """Of values [B or 1, G or 1, N] of the rows of all lower ranks those of the rows that came; padding: `fill`."""
        lists = common_lists([values, self.index])
        index, values = self.index.expand(*lists, -1), values.expand(*lists, -1)
        if values.shape[2] == 0:
            return values
        return values.gather(2, index.clamp(min=0)).masked_fill(index < 0, fill)


def common_lists(parts: Sequence[Tensor]) -> tuple[int, int]:
    """What tensors [B or 1, G or 1, ..] broadcast to. (That of torch imports sympy, which takes seconds.)"""
    return max((part.shape[0] for part in parts), default=1), max((part.shape[1] for part in parts), default=1)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, received: Tensor) -> Tensor:
        ctx.save_for_backward(received)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])
