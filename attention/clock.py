"""Two clocks for the new tokens of a row: time along the row, and position within the document.

Lifetimes are written in time; grids (blocks, spans, strides) are drawn on positions, so that a document
behaves packed with others as it does alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from attention.lifetimes import FOREVER
from attention.mixer import Context
from attention.ops.rotary import rotary_table
from attention.shard import Shard, bounds, gather_tokens

LONGEST_KEPT = 2**17  # tokens: the tables of longer rows are too large to keep between steps

Value = TypeVar("Value")


@dataclass
class Stream:
    """How far a state has come: the time of its next token, and when each row's document began."""

    now: int
    start_B: Tensor  # noqa: N815 - a shape suffix


@dataclass
class Clock:
    """Times and positions of the new tokens; leading dimension 1 where all rows are alike.

    now: time of the first one; time [1, T] int64; position [B or 1, T] int64; end [B or 1, T] int64: when the
    token's document ends, FOREVER while unknown, None if no document ends within the row.
    Of a sequence shard: `shard`; `row`, the clock of all its ranks' tokens, which begin at time 0; and which rank's
    these tokens are.
    """

    now: int
    time: Tensor
    position: Tensor
    end: Tensor | None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    shard: Shard | None = None
    row: Clock | None = None
    shard_rank: int = 0

    @property
    def whole(self) -> Clock:
        """The clock of the whole row: where there is no shard, this one."""
        return self if self.row is None else self.row

    @property
    def mine(self) -> slice:
        """Where these tokens stand among those of the whole row of a shard."""
        return slice(self.now, self.now + self.time.shape[1])

    def of_rank(self, rank: int) -> Clock:
        """The clock of the tokens of a rank, from that of one of them, which knows the whole row."""
        assert self.shard is not None
        return self.whole.part(self.shard, rank)

    def part(self, shard: Shard, rank: int) -> Clock:
        """Of the clock of a whole row that of the tokens of one rank. Its memo is kept with the row's."""
        here = slice(*bounds(shard, rank))
        end = None if self.end is None else self.end[:, here]
        memo: dict[Any, Any] = self.once(("shard", shard.lengths, rank), dict)
        return Clock(here.start, self.time[:, here], self.position[:, here], end, memo, shard, self, rank)

    @staticmethod
    def plain(length: int, device: torch.device | None = None) -> Clock:
        """One document per row, from its beginning."""
        time = torch.arange(length, device=device)[None]
        return Clock(0, time, time, None)

    @property
    def starts(self) -> Tensor:
        """[B or 1, T]: the time at which each token's document began."""
        return self.time - self.position

    @property
    def query_time(self) -> Tensor | None:
        """The times as `attend` takes those of its queries: int32 [1, 1, T], None for 0..T-1."""
        return None if self.now == 0 else self.time[:, None].to(torch.int32)

    @property
    def first_start_B(self) -> Tensor:  # noqa: N802 - a shape suffix
        """[B or 1]: when the first document among the new tokens begins; FOREVER if none does."""
        return torch.where(self.position == 0, self.time, FOREVER).amin(1)

    def until(self, death: Tensor) -> Tensor:
        """Nobody outlives its document: min(death, end) as int32 [B or 1, G or 1, T]; death int64 alike."""
        if self.end is not None:
            death = torch.minimum(death, self.end[:, None])
        return death.clamp(max=FOREVER).to(torch.int32)

    def rotary(self, dim: int, base: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' positions, computed once for all layers that rotate alike."""
        return self.once((dim, base), lambda: rotary_table(self.position[:, None], dim, base))

    def once(self, key: Any, compute: Callable[[], Value]) -> Value:
        """What `compute` returns, computed for the first of the layers that ask for `key`."""
        if key not in self.memo:
            with torch.inference_mode(False):  # what is kept may meet a backward pass later
                self.memo[key] = compute()
        return self.memo[key]

    def after(self, batch: int) -> Stream:
        """Where the stream stands behind the new tokens."""
        if self.now + self.time.shape[1] >= FOREVER:
            raise ValueError(f"a state holds at most {FOREVER - 1} tokens")
        last_start = (self.time[:, -1] - self.position[:, -1]).expand(batch)
        return Stream(self.now + self.time.shape[1], last_start.clone())


def read_clock(x: Tensor, ctx: Context | None, stream: Stream | None) -> Clock:
    """The clock of the new tokens x [B, T, ...], from what the context says and the stream has seen.

    Documents follow from either `positions` (a 0 begins one) or `document_ends`; what is not given goes on
    from the stream. Of a shard times and positions are those in the whole row. Raises ValueError for tensors of another
    shape than [B, T], or a stream of another batch, or of a shard.
    """
    batch, length = x.shape[:2]
    if ctx is not None and ctx.shard is not None:
        return _of_shard(ctx, batch, length, stream, x.device)
    if stream is not None and len(stream.start_B) != batch:
        raise ValueError(f"the state was made for {len(stream.start_B)} sequences, got {batch}")
    if ctx is None or (ctx.positions is None and ctx.document_ends is None):
        return _continue(length, stream, x.device)
    _check_shapes(ctx, batch, length)
    if stream is not None:
        return _packed(ctx.positions, ctx.document_ends, stream, x.device)
    return _once_per_pass(ctx, lambda: _packed(ctx.positions, ctx.document_ends, None, x.device))


def _of_shard(ctx: Context, batch: int, length: int, stream: Stream | None, device: torch.device) -> Clock:
    shard = ctx.shard
    assert shard is not None
    if stream is not None:
        raise ValueError(
            "a state goes on from tokens read before, a sequence shard from those of lower ranks: not both at once"
        )
    if shard.lengths[shard.rank] != length:
        raise ValueError(f"ctx.shard: rank {shard.rank} has {shard.lengths[shard.rank]} tokens, got {length}")
    if ctx.positions is None and ctx.document_ends is None:
        total = sum(shard.lengths)
        row = _plain(total, device) if total <= LONGEST_KEPT else _once_per_pass(ctx, lambda: _plain(total, device))
        return row.part(shard, shard.rank)
    _check_shapes(ctx, batch, length)

    def of_all_ranks(x: Tensor | None) -> Tensor | None:
        return None if x is None else gather_tokens(shard, x.to(device, torch.int32), 1)

    def whole_row() -> Clock:
        ends = None if ctx.document_ends is None else ctx.document_ends + bounds(shard, shard.rank)[0]
        return _packed(of_all_ranks(ctx.positions), of_all_ranks(ends), None, device)

    return _once_per_pass(ctx, whole_row).part(shard, shard.rank)


def _check_shapes(ctx: Context, batch: int, length: int) -> None:
    for name, value in (("positions", ctx.positions), ("document_ends", ctx.document_ends)):
        if value is not None and value.shape != (batch, length):
            raise ValueError(f"ctx.{name} must have shape [{batch}, {length}], got {list(value.shape)}")


def _once_per_pass(ctx: Context, compute: Callable[[], Clock]) -> Clock:
    """The same clock for all layers that are told the same."""
    given = (ctx.positions, ctx.document_ends)
    kept, clock = ctx.memo.get("packed", ((None, None), None))
    if clock is None or any(a is not b for a, b in zip(kept, given, strict=True)):
        clock = compute()
        ctx.memo["packed"] = given, clock
    return clock


@functools.lru_cache(maxsize=4)
def _kept(length: int, device: torch.device) -> Clock:
    with torch.inference_mode(False):
        return Clock.plain(length, device)


def _plain(length: int, device: torch.device) -> Clock:
    """The clock of rows of one document each, the same object again and again: with its memo it outlives a step."""
    if torch.compiler.is_compiling() or length > LONGEST_KEPT:
        return Clock.plain(length, device)
    return _kept(length, device)


def _continue(length: int, stream: Stream | None, device: torch.device) -> Clock:
    if stream is None or stream.now == 0:
        return _plain(length, device)
    time = torch.arange(stream.now, stream.now + length, device=device)[None]
    return Clock(stream.now, time, time - stream.start_B[:, None], None)


def _packed(positions: Tensor | None, ends: Tensor | None, stream: Stream | None, device: torch.device) -> Clock:
    now = 0 if stream is None else stream.now
    given = ends if positions is None else positions
    assert given is not None
    length = given.shape[1]
    index = torch.arange(length, device=device)[None]
    ends = _next_start(given.to(device), index) if ends is None else ends.to(device, torch.int64)
    if positions is not None:
        position = positions.to(device, torch.int64)
    else:
        before_B = torch.zeros_like(ends[:, 0]) if stream is None else now - stream.start_B
        position = _position(ends, index, before_B)
    return Clock(now, index + now, position, torch.where(ends < length, ends + now, FOREVER))


def _next_start(position: Tensor, index: Tensor) -> Tensor:
    """[B, T]: the index of the next position 0 behind each token, T if there is none."""
    length = position.shape[1]
    start = torch.where(position == 0, index, length)
    behind = torch.cat([start[:, 1:], start.new_full((len(start), 1), length)], 1)
    return behind.flip(1).cummin(1).values.flip(1)


def _position(ends: Tensor, index: Tensor, before: Tensor) -> Tensor:
    """Positions from document ends: a document begins where the one before it ends; the first goes on."""
    begins = torch.cat([torch.zeros_like(ends[:, :1], dtype=torch.bool), ends[:, :-1] == index[:, 1:]], 1)
    start = torch.where(begins, index, -before[:, None]).cummax(1).values
    return index - start
