"""Sparse Transformer: a near set and a far set of keys, so that two hops reach everything.

Source: Child et al., "Generating Long Sequences with Sparse Transformers" (2019, arXiv 1904.10509), section 4.3. The
printed range of summary columns has c + 1 of them; here there are c.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from attention.cache import LivingKeys
from attention.clock import Clock
from attention.divisors import divisors
from attention.earlier import EarlierKeys
from attention.lifetimes import FOREVER, Lifetimes, living_pairs
from attention.mixer import Mixer, register, setting
from attention.ops.attend import attend
from attention.ops.lanes import Lanes, attend_lanes, make_lanes
from attention.ops.merge import merge
from attention.softmax import AttentionConfig, SoftmaxAttention, TokenAttention


@dataclass
class SparseConfig(AttentionConfig):
    """Settings of `sparse`."""

    pattern: Literal["fixed", "strided"] = setting(
        "fixed",
        "fixed: the own block, and the summary columns of every block; strided: a window, and every block-th token",
    )
    block: int = setting(128, "tokens of a block (fixed); width of the window and stride (strided)", at_least=1)
    columns: int = setting(32, "summary columns of a block, at most block (fixed only)", at_least=1)
    arrangement: Literal["merged", "heads"] = setting(
        "merged", "merged: every head meets both sets; heads: the first half of the key heads near, the rest far"
    )
    distinct_columns: bool = setting(True, "key heads take turns with the columns of a block (fixed only)")

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Those of all softmax mixers, columns within the block, and halves of the key heads."""
        found = super().problems(dim)
        if self.pattern == "fixed" and self.columns > self.block:
            message = f"columns {self.columns} exceeds block {self.block}; nearest: columns {self.block}"
            found.append(("columns", message))
        number = self.kv_heads or self.heads
        if self.arrangement == "heads" and number % 2:
            name, fitting = ("kv_heads", divisors(self.heads)) if self.kv_heads else ("heads", [number - 1, number + 1])
            even = [n for n in fitting if n and n % 2 == 0]
            near = [n for n in even if n < number][-1:] + [n for n in even if n > number][:1]
            choices = ", ".join([*(f"{name} {n}" for n in near), "arrangement merged"])
            found.append((name, f"{name} {number} must be even while arrangement is heads; nearest: {choices}"))
        return found


@register("sparse")
class Sparse(SoftmaxAttention):
    """A query meets the tokens near it and a regular sample of all earlier ones."""

    Config = SparseConfig

    @classmethod
    def of(cls, dim: int, config: SparseConfig) -> Mixer:
        """`FixedSparse` or `StridedSparse`."""
        return FixedSparse(dim, config) if config.pattern == "fixed" else StridedSparse(dim, config)

    @property
    def halved(self) -> bool:
        """The first half of the key heads meets the near set, the other half the far set."""
        return self.config.arrangement == "heads"


class FixedSparse(Sparse, TokenAttention):
    """A token dies at the end of its block; those in the c summary columns of each block never do.

    Key head g has the columns [l - (s + 1) c, l - s c) of blocks of l tokens: s = g mod floor(l / c), or 0.
    """

    some_immortal = True

    def death(self, clock: Clock) -> Tensor:
        """End of the block, never for summary columns; of a far head all others are never alive."""
        block, columns = self.config.block, self.config.columns
        groups = block // columns if self.config.distinct_columns else 1
        head = torch.arange(self.kv_heads if groups > 1 or self.halved else 1, device=clock.time.device)[:, None]
        column, time = (clock.position % block)[:, None], clock.time[:, None]
        first = block - (head % groups + 1) * columns
        summary = (first <= column) & (column < first + columns)
        end = time + block - column
        if not self.halved:
            return torch.where(summary, FOREVER, end)
        far = torch.where(summary, FOREVER, time)
        return torch.where(head < self.kv_heads // 2, end, far)


class StridedSparse(Sparse):
    """A window of l tokens, and every l-th token behind it: two calls, disjoint where merged.

    The far set is the query's lane, the tokens of its document at positions equal mod l: l, 2 l, .. behind it, and, in
    far heads alone, itself. A state has one row per token for both sets; near heads keep those of the window only.
    """

    def death(self, clock: Clock) -> Tensor:
        """Never, since every residue is needed later; of near heads alone the end of the window."""
        never = torch.full_like(clock.time[:, None], FOREVER)
        if not self.halved:
            return never
        half, window = self.kv_heads // 2, clock.time[:, None] + self.config.block
        return torch.cat([x.expand(-1, half, -1) for x in (window, never)], 1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, clock: Clock, state: LivingKeys | EarlierKeys | None) -> Tensor:
        """See `SoftmaxAttention.mix`."""
        life = clock.once(self.alike, lambda: self.lifetimes(clock))
        if state is None:
            near, lanes = clock.once((self.alike, "sets"), lambda: self._sets(life, clock.starts[:, None]))
        else:
            k, v, life = state.extend(k, v, life, clock)
            sets = partial(self._sets, life, state.starts(clock), clock.time.shape[1], state.limit)
            near, lanes = sets() if clock.shard is None else clock.once((self.alike, "sets", len(q)), sets)
        time = clock.query_time
        if not self.halved:
            return merge([attend(q, k, v, near, time=time), attend_lanes(q, k, v, lanes)])[0]
        (near_q, far_q), (near_k, far_k), (near_v, far_v) = (x.chunk(2, 1) for x in (q, k, v))
        near_out, _ = attend(near_q, near_k, near_v, near, time=time)
        far_out, _ = attend_lanes(far_q, far_k, far_v, lanes)
        return torch.cat([near_out, far_out], 1)

    def _sets(
        self, life: Lifetimes, start: Tensor, queries: int | None = None, limit: int | None = None
    ) -> tuple[Lifetimes, Lanes]:
        """The near and the far set of rows [B or 1, G or 1, Nk] whose documents began at `start`.

        All near heads are alike, and all far heads.
        """
        stride = self.config.block
        first, last = (Lifetimes(life.birth[:, at], life.death[:, at]) for at in (slice(0, 1), slice(-1, None)))
        near = first.at_most(stride)
        start = start[:, -1:]
        # Neighbours in a lane are one stride apart.
        window = None if limit is None else -(-limit // stride)
        lanes = make_lanes((last.birth - start) % stride, start, queries=queries, window=window, strict=not self.halved)
        return near, lanes

    def pairs(self, length: int) -> int:
        """See `SoftmaxAttention.pairs`: those of both sets."""
        clock = Clock.plain(length, torch.device("cpu"))
        near, lanes = self._sets(self.lifetimes(clock), clock.starts[:, None])
        heads, kv_heads = (n // 2 if self.halved else n for n in (self.heads, self.kv_heads))
        return sum(
            living_pairs(life, batch=1, heads=heads, kv_heads=kv_heads, num_queries=length, num_keys=length)
            for life in (near, lanes.life)
        )
