"""Ranks that share a sequence trade tokens for heads: each attends for some of the heads, over all tokens of the row.

Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence
Transformer Models" (2023, arXiv 2309.14509). Queries, keys and values cross, and outputs come back: more than the keys
alone where keys are few, less where every rank needs all keys of many heads. And every rank has as much to do, while of
causal attention to gathered keys the last rank has most.

Shapes: B batch, H query heads, G key heads, T tokens of this rank, N of the whole row, n heads of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.lifetimes import Lifetimes
from attention.shard import Shard, bounds


@dataclass(frozen=True)
class HeadShare:
    """Which heads each rank takes: neighbours, as evenly as can be, and the key heads that they read.

    A key head that is read on several ranks goes to all of them.
    """

    ranks: int
    heads: int
    kv_heads: int

    def queries(self, rank: int) -> range:
        """The query heads of a rank."""
        return range(self.heads * rank // self.ranks, self.heads * (rank + 1) // self.ranks)

    def keys(self, rank: int) -> range:
        """The key heads that these read."""
        group, mine = self.heads // self.kv_heads, self.queries(rank)
        return range(mine.start // group, (mine.stop - 1) // group + 1)

    def vectors_sent(self, rank: int, lengths: Sequence[int]) -> int:
        """How many queries, keys, values and outputs a rank sends of one sequence, where ranks have so many tokens."""
        there = sum(len(self.queries(r)) + 2 * len(self.keys(r)) for r in range(self.ranks) if r != rank)
        return lengths[rank] * there + (sum(lengths) - lengths[rank]) * len(self.queries(rank))

    def local(self, rank: int) -> list[int]:
        """Of each query head of a rank, which of the rank's key heads it reads."""
        group = self.heads // self.kv_heads
        return [head // group - self.keys(rank).start for head in self.queries(rank)]


def to_heads(shard: Shard, x: Tensor, heads_of: list[range]) -> Tensor:
    """All tokens [B, n, N, w] of the heads of this rank, from the tokens of this rank [B, heads, T, w]; heads_of: those
    of each rank. Differentiable."""
    batch, heads, length, width = x.shape
    number = torch.arange(batch * heads * length, device=x.device).view(batch, heads, length)
    send = [number[:, theirs.start : theirs.stop].flatten() for theirs in heads_of]
    mine = len(heads_of[shard.rank])
    receive = [batch * mine * there for there in shard.lengths]
    parts = shard.exchange(x.reshape(-1, width), send, receive).split(receive)
    return torch.cat([part.view(batch, mine, -1, width) for part in parts], 2)


def to_tokens(shard: Shard, x: Tensor, heads_of: list[range]) -> Tensor:
    """The reverse: all heads [B, H, T, w] of the tokens of this rank, from all tokens [B, n, N, w] of its heads."""
    batch, heads, total, width = x.shape
    number = torch.arange(batch * heads * total, device=x.device).view(batch, heads, total)
    send = [number[..., slice(*bounds(shard, rank))].flatten() for rank in range(len(shard.lengths))]
    length = shard.lengths[shard.rank]
    receive = [batch * len(theirs) * length for theirs in heads_of]
    parts = shard.exchange(x.reshape(-1, width), send, receive).split(receive)
    return torch.cat([part.view(batch, -1, length, width) for part in parts], 1)


def of_heads(life: Lifetimes, heads: list[int]) -> Lifetimes:
    """The lifetimes of some key heads, in this order."""

    def chosen(x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else x[:, heads]

    generation = None if life.generation is None else chosen(life.generation)
    return Lifetimes(chosen(life.birth), chosen(life.death), generation)
