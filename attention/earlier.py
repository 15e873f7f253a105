"""What lies on the lower ranks of a sequence shard, in the place of the states of `attention.cache` and its likes.

The same calls as of a state: to the new tokens' keys come those of earlier ones. Here they come from other processes,
with their gradients, and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attention.cache import LivingKeys
from attention.clock import Clock
from attention.lifetimes import FOREVER, Lifetimes
from attention.shard import Shard, Travel, bounds


class EarlierKeys:
    """Keys of lower ranks that outlive their shard, in the place of `LivingKeys`.

    key: what tells apart the mixers of other lifetimes.
    """

    limit = None

    def __init__(self, clock: Clock, key: Any) -> None:
        self.clock, self.key = clock, key

    def extend(self, k: Tensor, v: Tensor, life: Lifetimes, clock: Clock) -> tuple[Tensor, Tensor, Lifetimes]:
        """k [B, G, T, D] and v of the new tokens, behind those that come, and their lifetimes; `life`: of the row."""
        assert clock.shard is not None
        batch, heads = k.shape[:2]
        travel = self._travel(batch, heads, life)
        came = travel.bring(clock.shard, torch.cat([k, v], -1)).split([k.shape[-1], v.shape[-1]], -1)
        k, v = (torch.cat(pair, 2) for pair in zip(came, (k, v), strict=True))
        life = clock.once((self.key, "known"), lambda: known(travel, life, clock))
        return k, v, life

    def starts(self, clock: Clock) -> Tensor:
        """[B or 1, G or 1, N] of all keys, after `extend`: when the key's document began, FOREVER for padding."""
        travel = self._travel(*self.sizes)
        began = travel.take(clock.whole.starts[:, None, : clock.now], FOREVER)
        return joined(began, clock.starts[:, None])

    def advance(self, clock: Clock) -> None:
        """Nothing is kept."""

    def _travel(self, batch: int, heads: int, life: Lifetimes | None = None) -> Travel:
        self.sizes = batch, heads
        shard = self.clock.shard
        assert shard is not None

        def plan() -> Travel:
            assert life is not None
            lives = [slice_of(life, self.clock.of_rank(rank).mine) for rank in range(len(shard.lengths))]
            return Travel.of_living(shard, batch, heads, lives)

        return self.clock.once((self.key, "travel", batch, heads), plan)


class EarlierTokens:
    """The last tokens of the lower ranks, as many as a rank needs, in the place of `attention.tail.Tail`."""

    def __init__(self, clock: Clock, key: Any, needed: Callable[[Clock], int]) -> None:
        """needed: how many tokens right before those of a clock."""
        self.clock, self.key = clock, key
        self.needed = lambda: [needed(clock.of_rank(rank)) for rank in range(len(_shard(clock).lengths))]

    @property
    def counts(self) -> list[int]:
        """Of each rank how many tokens it needs."""
        return self.clock.once((self.key, "needed"), self.needed)

    @property
    def size(self) -> int:
        """How many tokens come."""
        return self.counts[_shard(self.clock).rank]

    def bring(self, rows: Tensor) -> Tensor:
        """Rows [B, G, size, w] of the tokens that come, from those of the own tokens [B, G, T, w]. Differentiable."""
        batch, heads = rows.shape[:2]
        shard, counts = _shard(self.clock), self.counts

        def needed(source: int, target: int) -> Tensor:
            return (self.clock.of_rank(source).time >= bounds(shard, target)[0] - counts[target])[None]

        plan = partial(Travel.of, shard, batch, heads, needed)
        return self.clock.once((self.key, "tail", batch, heads), plan).bring(shard, rows)

    def before(self, new: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """The tokens that come, and the new ones behind them; `new`: of one type, [B, heads, T, width]."""
        assert count == self.size
        return {name: torch.cat([self.bring(x), x], 2) for name, x in new.items()}


def earlier(state: Any, clock: Clock, key: Any) -> LivingKeys | EarlierKeys | None:
    """What the new tokens go on from: a state, or, of a shard, the lower ranks; None: nothing."""
    if state is not None or clock.shard is None:
        return state
    return EarlierKeys(clock, key)


def _shard(clock: Clock) -> Shard:
    assert clock.shard is not None
    return clock.shard


def slice_of(life: Lifetimes, here: slice) -> Lifetimes:
    """The lifetimes of some of the keys."""
    generation = None if life.generation is None else life.generation[..., here]
    return Lifetimes(life.birth[..., here], life.death[..., here], generation)


def known(travel: Travel, life: Lifetimes, clock: Clock) -> Lifetimes:
    """Lifetimes of the keys that come, and of the own behind them; `life`: of the tokens of the whole row."""
    came, own = travel.living(slice_of(life, slice(0, clock.now))), slice_of(life, clock.mine)
    generation = None
    if came.generation is not None and own.generation is not None:
        generation = joined(came.generation, own.generation)
    return Lifetimes(joined(came.birth, own.birth), joined(came.death, own.death), generation)


def joined(came: Tensor, own: Tensor) -> Tensor:
    """[B or 1, G or 1, m] and [B or 1, G or 1, T] side by side."""
    lists = torch.broadcast_shapes(came.shape[:2], own.shape[:2])
    return torch.cat([came.expand(*lists, -1), own.expand(*lists, -1)], 2)
