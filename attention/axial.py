"""Combiner, axial: the tokens laid out in rows; each earlier row is met through one abstraction per column.

Source: Ren et al., "Combiner" (2021, arXiv 2107.05768), section 4.2, axial-rowmajor. For a token t:

    vbar_t = attention of t to its whole row, later tokens included
    kbar_t = LN(x_t + vbar_t W_o') W_k', rotated at t's position

and a query has one softmax over its own row up to itself and (kbar_t, vbar_t) of the token t above it in every earlier
row: t's row is complete before anybody meets it.

Shapes: B batch, T new tokens, R of them and those of the open row before them, N keys, H heads, D head width, s span.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attention.clock import Clock
from attention.combiner import Combiner, CombinerConfig
from attention.earlier import EarlierKeys, EarlierTokens, side_by_side
from attention.lifetimes import FOREVER, Lifetimes, living_pairs
from attention.mixer import Cost, init_fan_in
from attention.ops.attend import attend
from attention.ops.lanes import Lanes, attend_lanes, make_lanes
from attention.ops.merge import merge
from attention.spans import block_end, with_earlier
from attention.tail import SpanState


class AxialCombiner(Combiner, pattern="axial"):
    """The tokens of the own row of s, and of each row before it the abstraction in the own column: two calls.

    A state holds kbar and vbar of every token of complete rows; and of the open row q, k, v and x.
    """

    def __init__(self, dim: int, config: CombinerConfig) -> None:
        super().__init__(dim, config)
        width = self.heads * self.head_dim
        self.row_output = init_fan_in(nn.Linear(width, dim, bias=False))
        self.row_norm = nn.LayerNorm(dim, bias=False)
        self.row_key = init_fan_in(nn.Linear(dim, width, bias=False))

    def death(self, clock: Clock) -> Tensor:
        """The end of the row."""
        return block_end(clock, self.config.span)

    def meet(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, clock: Clock, state: SpanState | None) -> Tensor:
        """See `Combiner.meet`."""
        q, k = self.turned(q, clock), self.turned(k, clock)
        rows = new = {"q": q, "k": k, "v": v, "x": x[:, None]}
        recent, limit = clock, None
        if state is not None:
            rows, limit = state.tail.before(new, state.tail.size), state.limit
            recent = with_earlier(clock, state.tail.size)
        tail = None
        if clock.shard is not None:
            tail = EarlierTokens(clock, self.alike, lambda there: int((there.position[:, 0] % self.config.span).max()))
            rows, recent = tail.before(new), with_earlier(clock, tail.size)
        life = clock.once((self.alike, limit), lambda: self.direct(recent, limit))
        parts = [attend(q, rows["k"], rows["v"], life, time=clock.query_time)]
        if tail is not None:
            parts.append(self.above_of_row(q, rows, clock, recent, tail))
        elif recent.time.shape[1] >= self.config.span or (state is not None and state.size):
            parts.append(self.above(q, rows, clock, recent, state))
        if state is not None:
            state.keep(new, (clock.position[:, -1] + 1) % self.config.span, clock)
        return parts[0][0] if len(parts) == 1 else merge(parts)[0]

    def above(
        self, q: Tensor, rows: dict[str, Tensor], clock: Clock, recent: Clock, state: SpanState | None
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of q [B, H, T, D] among the abstractions of the rows above, which the state takes up.

        rows: q, k, v [B, H, R, D] and x [B, 1, R, d] of the tokens of `recent`.
        """
        complete = recent.time.shape[1] >= self.config.span  # else no row can be, and nobody meets the new keys
        own = recent if complete else clock
        birth, start = own.time, own.starts
        keys = values = torch.zeros_like(q)
        if complete:
            life, start = clock.once((self.alike, "rows"), lambda: self.whole_rows(recent))
            keys, values = self.row_keys(rows, life, recent)
        if state is None:
            lanes = clock.once((self.alike, "lanes"), lambda: self.lanes(birth, start))
        else:
            nobody = torch.zeros(len(q), 1, 0, dtype=torch.int32, device=q.device)
            old_k, old_v, old = state.extend(keys[:, :, :0], values[:, :, :0], Lifetimes(nobody, nobody), clock)
            began = torch.where(old.death[:, 0] > clock.now, state.stream.start_B[:, None], FOREVER)
            birth = torch.cat([old.birth[:, 0], birth.expand(len(q), -1)], 1)
            start = torch.cat([began, start.expand(len(q), -1)], 1)
            lanes = self.lanes(birth, start, clock.time.shape[1], state.limit)
            if complete:
                state.extend(keys, values, self.kept(life, own), clock)
            keys, values = torch.cat([old_k, keys], 2), torch.cat([old_v, values], 2)
        return self.among(q, keys, values, lanes)

    def above_of_row(
        self, q: Tensor, rows: dict[str, Tensor], clock: Clock, recent: Clock, tail: EarlierTokens
    ) -> tuple[Tensor, Tensor]:
        """As `above`, of a shard: keys come from the lower ranks. Every rank goes through the same steps."""
        life, start = clock.once((self.alike, "rows"), lambda: self.whole_rows(recent))
        made, values = self.row_keys(rows, life, recent)

        def lifetimes(there: Clock) -> Lifetimes:
            theirs = with_earlier(there, tail.counts[there.shard_rank])
            return self.kept(self.whole_rows(theirs)[0], theirs)

        earlier = EarlierKeys(clock, (self.alike, "above"), lifetimes)
        keys, values, known = earlier.extend(made, values, self.kept(life, recent), clock)
        came = known.birth[:, :, : keys.shape[2] - made.shape[2]]

        def lanes() -> Lanes:
            began = torch.where(came < FOREVER, clock.whole.starts[:, None, max(clock.now - 1, 0), None], FOREVER)
            birth = side_by_side([came.long(), recent.time[:, None]])[:, 0]
            return self.lanes(birth, side_by_side([began, start[:, None]])[:, 0], clock.time.shape[1])

        return self.among(q, keys, values, clock.once((self.alike, "lanes of shard", len(q)), lanes))

    def kept(self, life: Lifetimes, clock: Clock) -> Lifetimes:
        """Of the abstractions of the clock's tokens, `life` being what `whole_rows` says: to the end of the document,
        or never where the row is not complete; int32 [B or 1, 1, R]."""
        never = clock.until(torch.full_like(clock.time, FOREVER)[:, None])
        death = never.masked_fill(life.death == life.birth, 0)
        return Lifetimes(clock.time[:, None].to(torch.int32), death)

    def among(self, q: Tensor, keys: Tensor, values: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor]:
        """(out, lse) of q [B, H, T, D] among abstractions."""
        out, lse = attend_lanes(q, keys, values, lanes)
        return out, lse + math.log(self.config.span) if self.config.span_bias else lse

    def lanes(self, birth: Tensor, start: Tensor, queries: int | None = None, limit: int | None = None) -> Lanes:
        """The columns of tokens that came at `birth` in documents begun at `start`, int64 [B or 1, N]; the last ask."""
        span = self.config.span
        window = None if limit is None else -(-limit // span)  # neighbours in a column are one row apart
        lane = (birth - start) % span
        return make_lanes(lane[:, None], start[:, None], queries=queries, window=window, strict=True)

    def whole_rows(self, clock: Clock) -> tuple[Lifetimes, Tensor]:
        """Every token lives through its whole row, int32 [B or 1, 1, R], or never where the row is not complete; and
        when its document began, int64 [B or 1, R]: of a row that began before these tokens, each is one of its own."""
        span, behind = self.config.span, clock.now + clock.time.shape[1]
        begin = clock.time - clock.position % span
        begins_here = (clock.position >= 0) & (begin >= clock.now)
        end = (begin + span)[:, None]
        whole = begins_here[:, None] & (end <= behind) & (end == clock.until(end))
        death = torch.where(whole, end, begin[:, None])
        life = Lifetimes(begin[:, None].to(torch.int32), death.to(torch.int32))
        return life, torch.where(begins_here, clock.starts, clock.time)

    def row_keys(self, rows: dict[str, Tensor], life: Lifetimes, clock: Clock) -> tuple[Tensor, Tensor]:
        """kbar and vbar [B, H, R, D] of the clock's tokens."""
        mean, _ = attend(rows["q"], rows["k"], rows["v"], life, time=clock.query_time)
        x = rows["x"].squeeze(1) + self.row_output(mean.transpose(1, 2).flatten(2))
        return self.turned(self._heads(self.row_key(self.row_norm(x))), clock), mean

    def pairs(self, length: int) -> int:
        """See `SoftmaxAttention.pairs`: those of both calls; without those from which abstractions are made."""
        clock = Clock.plain(length, torch.device("cpu"))
        sizes = {"batch": 1, "heads": self.heads, "kv_heads": self.heads, "num_queries": length, "num_keys": length}
        near, above = self.lifetimes(clock), self.lanes(clock.time, clock.starts).life
        return living_pairs(near, None, **sizes) + living_pairs(above, None, **sizes)

    def cost(self, length: int) -> Cost:
        """As `SoftmaxAttention.cost`; and where a row is complete, 4D s for every token of one and head, and 4dHD for
        every token."""
        rows, open_tokens = divmod(length, self.config.span)
        width = self.heads * self.head_dim
        flops = 4 * width * rows * self.config.span**2 + (4 * length * self.dim * width if rows else 0)
        kept = 2 * width * rows * self.config.span + (width + self.dim) * open_tokens
        return super().cost(length) + Cost(0, flops, 0, kept * self.qkv.weight.element_size())
