"""What lies on the lower ranks of a sequence shard, in the place of the states of `attention.cache` and its likes.

The same calls as of a state: to the new tokens' keys come those of earlier ones. Here they come from other processes,
with their gradients, and nothing is stored. `key` tells apart, in the memo of a clock, the mixers that ask for others.

Legend of shapes: B batch, G key heads, T tokens of this rank, m keys that come from lower ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attention.clock import Clock
from attention.lifetimes import FOREVER, Lifetimes
from attention.shard import Shard, Travel, alive_in, bounds, common_lists


class EarlierKeys:
    """Keys of lower ranks that outlive their shard, in the place of `LivingKeys`.

    lifetimes: of the keys that a rank makes, int32 [B or 1, G or 1, its number of them], from the clock of its tokens.
    """

    limit = None

    def __init__(self, clock: Clock, key: Any, lifetimes: Callable[[Clock], Lifetimes]) -> None:
        self.clock, self.key, self.lifetimes = clock, key, lifetimes

    def extend(self, k: Tensor, v: Tensor, life: Lifetimes, clock: Clock) -> tuple[Tensor, Tensor, Lifetimes]:
        """With k [B, G, n, D] and v that this rank makes, and their lifetimes, behind them, all [B, G, m + n, ..] that
        its queries may meet."""
        travel = self.travel(k)
        k, v = travel.put_in_front(shard_of(clock), k, v)
        return k, v, clock.once((self.key, "known", len(k)), lambda: self._known(travel, life))

    def starts(self, clock: Clock) -> Tensor:
        """[B or 1, G or 1, m + T] where keys are tokens, after `extend`: when the document of each began, FOREVER for
        padding."""
        began = self.met.take(clock.whole.starts[:, None, : clock.now], FOREVER)
        return side_by_side([began, clock.starts[:, None]])

    def advance(self, clock: Clock) -> None:
        """Nothing is kept."""

    def travel(self, k: Tensor) -> Travel:
        """Which keys go where; k: those of this rank."""
        shard = shard_of(self.clock)
        lives = [self._lives(rank) for rank in range(len(shard.lengths))]
        self.met = self.clock.once((self.key, "travel", *k.shape[:2]), lambda: Travel.of_living(shard, k, lives))
        return self.met

    def most_sent(self, k: Tensor) -> int:
        """How many rows of keys the rank sends that sends most, of all heads and sequences; k: those of this rank."""
        shard, (batch, heads) = shard_of(self.clock), k.shape[:2]

        def count() -> int:
            sent = []
            for source in range(len(shard.lengths)):
                targets = range(source + 1, len(shard.lengths))
                masks = [alive_in(shard, self._lives(source), target) for target in targets]
                sent.append(sum(int(mask.expand(batch, heads, -1).sum()) for mask in masks))
            return max(sent)

        return self.clock.once((self.key, "most sent", batch, heads), count)

    def _lives(self, rank: int) -> Lifetimes:
        there = self.clock.of_rank(rank)
        return there.once(self.key, lambda: self.lifetimes(there))

    def _known(self, travel: Travel, own: Lifetimes) -> Lifetimes:
        lower = [self._lives(rank) for rank in range(shard_of(self.clock).rank)]

        def known(name: str, fill: int) -> Tensor:
            mine = getattr(own, name)
            theirs = side_by_side([mine[..., :0], *(getattr(life, name) for life in lower)])
            return side_by_side([travel.take(theirs, fill), mine])

        generation = None if own.generation is None else known("generation", 0)
        return Lifetimes(known("birth", FOREVER), known("death", 0), generation)


class EarlierTokens:
    """The last tokens of the lower ranks, as many as a rank needs, in the place of `attention.tail.Tail`.

    needed: how many tokens right before those of a clock.
    """

    def __init__(self, clock: Clock, key: Any, needed: Callable[[Clock], int]) -> None:
        self.clock, self.key = clock, key
        ranks = range(len(shard_of(clock).lengths))
        self.counts = clock.once((key, "needed"), lambda: [needed(clock.of_rank(rank)) for rank in ranks])

    @property
    def size(self) -> int:
        """How many tokens come."""
        return self.counts[shard_of(self.clock).rank]

    def before(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tokens that come, and the new ones behind them: rows [B, heads, T, width]. Differentiable."""
        alike: dict[Any, list[str]] = {}
        for name, x in new.items():
            alike.setdefault((x.dtype, x.shape[1]), []).append(name)
        rows: dict[str, Tensor] = {}
        for names in alike.values():
            own = torch.cat([new[name] for name in names], -1)
            both = torch.cat([self._bring(own), own], 2)
            rows |= zip(names, both.split([new[name].shape[-1] for name in names], -1), strict=True)
        return rows

    def _bring(self, rows: Tensor) -> Tensor:
        shard = shard_of(self.clock)

        def needed(source: int, target: int) -> Tensor:
            return (self.clock.of_rank(source).time >= bounds(shard, target)[0] - self.counts[target])[None]

        key = self.key, "tail", *rows.shape[:2]
        return self.clock.once(key, lambda: Travel.of(shard, rows, needed)).bring(shard, rows)


def earlier(state: Any, clock: Clock, key: Any, lifetimes: Callable[[Clock], Lifetimes]) -> Any:
    """What the new tokens go on from: a state, or, of a shard, `EarlierKeys`; None: nothing."""
    if state is not None or clock.shard is None:
        return state
    return EarlierKeys(clock, key, lifetimes)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[B or 1, G or 1, ..] each, in one [B or 1, G or 1, sum]."""
    lists = common_lists(parts)
    return torch.cat([part.expand(*lists, -1) for part in parts], 2)


def shard_of(clock: Clock) -> Shard:
    """The clock's shard, which there is."""
    assert clock.shard is not None
    return clock.shard
