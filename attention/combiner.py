"""Combiner: every earlier token is met, most of them through one abstraction of the span they lie in.

Source: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost" (2021, arXiv 2107.05768),
sections 3 and 4. For a span of positions Omega, channel by channel:

    q_Omega = max of q_j over j in Omega, k_Omega = max of k_j       (before rotary; then both at Omega's last position)
    v_Omega = sum over j in Omega of softmax_j(q_Omega k_j D^-1/2) v_j

A query has one softmax over its direct tokens and the abstractions (k_Omega, v_Omega) of its spans. The paper is
multi-head; here q_Omega is also the max over the query heads that share a key head. Its mixture of two directions and
its learnt partition are not offered. The third pattern, axial, is in `attention.axial`.

Shapes: B batch, T new tokens, R of them and the earlier ones still needed, n abstractions, H query heads, G key heads,
D head width, s span.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attention.cache import LivingKeys
from attention.clock import Clock, read_clock
from attention.earlier import EarlierKeys, EarlierTokens, side_by_side
from attention.lifetimes import FOREVER, Lifetimes, living_pairs
from attention.mixer import Context, Cost, Mixer, MixerOutput, floating, register, setting
from attention.ops.attend import attend
from attention.ops.rotary import apply_rotary, rotary_table
from attention.softmax import AttentionConfig, SoftmaxAttention
from attention.spans import Blocks, averaged, block_end, largest, with_earlier
from attention.tail import SpanState

LONG = 128  # steps: abstractions that outlive a tile of queries are a generation of their own


@dataclass
class CombinerConfig(AttentionConfig):
    """Settings of `combiner`."""

    pattern: Literal["fixed", "logsparse", "axial"] = setting(
        "fixed",
        "fixed: the own block, and one key for each block before it; logsparse: itself, and one key for each set bit "
        "of its position; axial: the own row, and one key for each row before it",
    )
    span: int = setting(64, "tokens of a block or a row (fixed, axial)", at_least=1)
    span_bias: bool = setting(False, "a key made of n tokens has log n added to its logit")

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Those of all softmax mixers; axial makes keys anew, for every head."""
        found = super().problems(dim)
        if self.pattern == "axial" and self.kv_heads not in (None, self.heads):
            message = f"kv_heads {self.kv_heads} must equal heads {self.heads} while pattern is axial"
            found.append(("kv_heads", message))
        return found


@register("combiner")
class Combiner(SoftmaxAttention):
    """Softmax attention to direct tokens and to abstractions of spans; a subclass for each pattern."""

    Config = CombinerConfig
    sequence_parallel = "tokens of open spans, and keys of whole ones"
    patterns: ClassVar[dict[str, type[Combiner]]] = {}

    def __init_subclass__(cls, pattern: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if pattern is not None:
            Combiner.patterns[pattern] = cls

    @classmethod
    def of(cls, dim: int, config: CombinerConfig) -> Mixer:
        """The mixer of `config.pattern`."""
        return cls.patterns[config.pattern](dim, config)

    @abstractmethod
    def meet(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, clock: Clock, state: SpanState | None) -> Tensor:
        """Outputs of the heads [B, H, T, D], from x [B, T, d], q [B, H, T, D] and k, v [B, G, T, D], not rotated.

        With a state: meets what it holds, and moves it on.
        """

    def forward(self, x: Tensor, ctx: Context | None = None, state: LivingKeys | None = None) -> MixerOutput:
        """y [B, T, d] from x [B, T, d]; see `Mixer.forward`."""
        assert state is None or isinstance(state, SpanState)
        clock = read_clock(x, ctx, None if state is None else state.stream)
        out = self.meet(x, *self.project(x), clock, state)
        return MixerOutput(self.merged(out), {})

    def init_state(self, batch: int, limit: int | None = None) -> SpanState:
        """An empty state for `batch` sequences. An open block or row is held whole, also where it exceeds `limit`."""
        return SpanState(batch, self.qkv.weight.device, limit)

    def direct(self, clock: Clock, limit: int | None) -> Lifetimes:
        """`lifetimes` of the tokens, none of them longer than the limit."""
        life = self.lifetimes(clock)
        return life if limit is None else life.at_most(limit)


@dataclass(frozen=True, eq=False)
class Level:
    """The spans of one length that abstractions are made of: the blocks `which`, some of them never alive.

    reach: int64 [B or 1, n], how many tokens of its document come before the end of each; life: of the abstractions,
    int32 [B or 1, n]; table: rotary at their last positions.
    """

    blocks: Blocks
    which: slice
    reach: Tensor
    life: Lifetimes
    table: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class Plan:
    """What follows from the clock alone. direct, spans, both: lifetimes int32 [B or 1, 1, ...] of the R direct tokens,
    of the n abstractions of all levels, and of the two together; reach [B or 1, n]: see `Level`."""

    levels: list[Level]
    direct: Lifetimes
    spans: Lifetimes
    both: Lifetimes
    reach: Tensor


class SpanCombiner(Combiner):
    """Direct tokens and abstractions in one call of `attend`."""

    @abstractmethod
    def lengths(self, count: int, limit: int | None) -> list[tuple[int, int]]:
        """Lengths of the spans among `count` tokens, each a divisor of the next; with each of them k, if every k-th
        block of a document is one (where one document fills the row; else all are tried)."""

    @abstractmethod
    def size(self, reach: Tensor, limit: int | None) -> Tensor:
        """Length of the span that ends so far into its document; int64 of any shape."""

    @abstractmethod
    def lifespan(self, reach: Tensor) -> Tensor:
        """For how many steps its abstraction lives; int64 of any shape."""

    @abstractmethod
    def needed(self, clock: Clock) -> int:
        """How many tokens before those of the clock become, with some of these, part of a span."""

    @abstractmethod
    def recall(self, state: SpanState, new: dict[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        """q, k, v [B, G, R, D]: of the earlier tokens still needed, and of the new ones behind them."""

    @abstractmethod
    def remember(self, state: SpanState, new: dict[str, Tensor], rows: dict[str, Tensor], clock: Clock) -> None:
        """Move on behind the new tokens; `rows` is what `recall` gave."""

    @abstractmethod
    def vectors_kept(self, length: int) -> int:
        """Vectors [G, D] of `length` tokens in a state, besides living keys and values."""

    def meet(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, clock: Clock, state: SpanState | None) -> Tensor:
        """See `Combiner.meet`."""
        group = self.heads // self.kv_heads
        shared = q if group == 1 else q.unflatten(1, (self.kv_heads, group)).amax(2)
        rows = new = {"q": shared, "k": k, "v": v}
        limit = None
        tail = None if clock.shard is None else EarlierTokens(clock, self.alike, self.needed)
        if state is not None:
            rows, limit = self.recall(state, new, clock), state.limit
        elif tail is not None:
            rows = tail.before(new)
        recent = with_earlier(clock, rows["k"].shape[2] - k.shape[2])
        plan = clock.once((self.alike, limit), lambda: self.plan(recent, clock.now, limit))
        direct = self.turned(rows["k"], recent)
        keys, values = self.abstractions(rows, direct, plan.levels)
        life, reach = plan.both, plan.reach
        if state is not None:
            keys, values, spans = state.extend(keys, values, plan.spans, clock)
            spans = Lifetimes(spans.birth[:, :1], spans.death[:, :1])  # all heads are alike
            stored, began = keys.shape[2] - reach.shape[1], state.stream.start_B[:, None]
            reach = torch.cat([spans.birth[:, 0, :stored] - began, reach.expand(len(began), -1)], 1)
            life = self.together(plan.direct, spans, reach)
            self.remember(state, new, rows, clock)
        elif tail is not None:
            made = keys.shape[2]
            keys, values, spans = self.of_lower_ranks(clock, tail).extend(keys, values, plan.spans, clock)
            began = clock.whole.starts[:, max(clock.now - 1, 0), None]  # of whom they met, the document goes on
            came = spans.birth[:, 0, : keys.shape[2] - made] - began
            reach = side_by_side([came[:, None], reach[:, None]])[:, 0]
            life = self.together(plan.direct, spans, reach)
        bias = self.bias(direct, self.size(reach, limit)) if self.config.span_bias else None
        keys, values = torch.cat([direct, keys], 2), torch.cat([rows["v"], values], 2)
        return attend(self.turned(q, clock), keys, values, life, time=clock.query_time, key_bias=bias)[0]

    def of_lower_ranks(self, clock: Clock, tail: EarlierTokens) -> EarlierKeys:
        """The abstractions that lower ranks make."""
        counts = tail.counts

        def spans(there: Clock) -> Lifetimes:
            assert there.shard is not None
            recent = with_earlier(there, counts[there.shard_rank])
            return there.once((self.alike, None), lambda: self.plan(recent, there.now, None)).spans

        return EarlierKeys(clock, (self.alike, "spans"), spans)

    def abstractions(self, rows: dict[str, Tensor], direct: Tensor, levels: list[Level]) -> tuple[Tensor, Tensor]:
        """k_Omega and v_Omega [B, G, n, D] of the spans of all levels, from q, k, v [B, G, R, D] of the tokens, and
        `direct`, which is k rotated."""
        q, k, v, unit = rows["q"], rows["k"], rows["v"], 1
        keys, values = [k[:, :, :0]], [v[:, :, :0]]
        for level in levels:
            blocks, which = level.blocks, level.which
            k_here, v_here = blocks.tokens(direct, which), blocks.tokens(v, which)
            if blocks.length == 1:  # the abstraction of one token is that token
                keys.append(k_here.squeeze(3))
                values.append(v_here.squeeze(3))
                continue
            q, k = (largest(blocks.tokens(t, unit=unit)) for t in (q, k))
            unit = blocks.length
            query, key = q[:, :, which], k[:, :, which]
            if level.table is not None:
                query, key = apply_rotary(query, level.table), apply_rotary(key, level.table)
            keys.append(key)
            values.append(averaged(query, k_here, v_here))
        return torch.cat(keys, 2), torch.cat(values, 2)

    def bias(self, direct: Tensor, size: Tensor) -> Tensor:
        """log(size [B or 1, n]) for the abstractions, behind 0 for the tokens [B, G, R, D]: [B or 1, 1, R + n]."""
        zeros = torch.zeros(size.shape[0], direct.shape[2], device=size.device, dtype=floating(direct))
        return torch.cat([zeros, size.clamp(min=1).to(zeros.dtype).log()], 1)[:, None]

    def plan(self, recent: Clock, now: int, limit: int | None) -> Plan:
        """The plan for tokens of which those from time `now` on are new."""
        lengths = self.lengths(recent.time.shape[1], limit)
        levels = [self.level(recent, now, length, every, limit) for length, every in lengths]
        none = recent.position[:, :0]
        birth = torch.cat([none.to(torch.int32), *(level.life.birth for level in levels)], 1)[:, None]
        death = torch.cat([none.to(torch.int32), *(level.life.death for level in levels)], 1)[:, None]
        direct, spans = self.direct(recent, limit), Lifetimes(birth, death)
        reach = torch.cat([none, *(level.reach for level in levels)], 1)
        return Plan(levels, direct, spans, self.together(direct, spans, reach), reach)

    def together(self, direct: Lifetimes, spans: Lifetimes, reach: Tensor) -> Lifetimes:
        """Both, int32 [B or 1, 1, R + n]; reach [B or 1, n] is that of the abstractions."""
        rows = max(len(direct.birth), len(direct.death), len(spans.birth))
        birth, death = (
            torch.cat([t.expand(rows, 1, -1) for t in pair], 2)
            for pair in ((direct.birth, spans.birth), (direct.death, spans.death))
        )
        long = (self.lifespan(reach) >= LONG).to(torch.int32)
        generation = torch.cat([long.new_zeros(len(long), direct.birth.shape[2]), long], 1)[:, None]
        return Lifetimes(birth, death, generation)

    def level(self, recent: Clock, now: int, length: int, every: int, limit: int | None) -> Level:
        """The abstractions of the blocks of this length that new tokens complete."""
        blocks = Blocks.of(recent, length)
        # No block ends more than L tokens behind its anchor i L + L - 1: skip those that must have ended before.
        skip = max(0, -(-(now - recent.now + 2) // length) - 2)
        which = slice(skip, None, every if blocks.first is None else 1)
        whole, born, end, last = (t[:, which] for t in (blocks.whole, blocks.born, blocks.end, blocks.last))
        reach = last + 1
        made = whole & (born > now) & (self.size(reach, limit) == length)
        death = torch.minimum(born + self.lifespan(reach), end).clamp(max=FOREVER).masked_fill(~made, 0)
        table = rotary_table(last[:, None], self.head_dim, self.config.rotary) if self.config.rotary else None
        return Level(blocks, which, reach, Lifetimes(born.to(torch.int32), death.to(torch.int32)), table)

    def pattern(self, length: int) -> Lifetimes:
        """Lifetimes of the tokens of one document, and of its abstractions behind them; int32 [1, keys], all key heads
        being alike."""
        both = self._plan(length).both
        assert both.generation is not None
        return Lifetimes(both.birth[0], both.death[0], both.generation[0])

    def pairs(self, length: int) -> int:
        """See `SoftmaxAttention.pairs`; without those from which abstractions are made."""
        life = self.pattern(length)
        heads = {"heads": self.heads, "kv_heads": self.kv_heads}
        return living_pairs(life, None, batch=1, num_queries=length, num_keys=life.birth.shape[-1], **heads)

    def cost(self, length: int) -> Cost:
        """As `SoftmaxAttention.cost`; and 4D G flops for every token of every span that has more than one."""
        plan = self._plan(length)
        sizes = [(level.blocks.length, level.reach.shape[1]) for level in plan.levels]
        pooled = sum(size * number for size, number in sizes if size > 1)
        width = self.kv_heads * self.head_dim
        kept = 2 * int((plan.spans.death > length).sum()) + self.vectors_kept(length)
        return super().cost(length) + Cost(0, 4 * width * pooled, 0, kept * width * self.qkv.weight.element_size())

    def _plan(self, length: int) -> Plan:
        return self.plan(Clock.plain(length, torch.device("cpu")), 0, None)


class FixedCombiner(SpanCombiner, pattern="fixed"):
    """The tokens of the own block of s, and one abstraction of each block before it.

    A state holds k and v of the tokens of the open block and the largest of their queries, and all abstractions.
    """

    def death(self, clock: Clock) -> Tensor:
        """The end of the block."""
        return block_end(clock, self.config.span)

    def lengths(self, count: int, limit: int | None) -> list[tuple[int, int]]:
        """s, every block."""
        return [(self.config.span, 1)] if count >= self.config.span else []

    def size(self, reach: Tensor, limit: int | None) -> Tensor:
        """s."""
        return torch.full_like(reach, self.config.span)

    def lifespan(self, reach: Tensor) -> Tensor:
        """For ever."""
        return torch.full_like(reach, FOREVER)

    def needed(self, clock: Clock) -> int:
        """The open block."""
        return int((clock.position[:, 0] % self.config.span).max())

    def recall(self, state: SpanState, new: dict[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        """The open block; its largest query stands for each of its queries."""
        if state.peak is None:
            return new
        earlier = state.peak.expand(-1, -1, state.tail.size, -1)
        rows = state.tail.before({"k": new["k"], "v": new["v"]}, state.tail.size)
        return {"q": torch.cat([earlier, new["q"]], 2), **rows}

    def remember(self, state: SpanState, new: dict[str, Tensor], rows: dict[str, Tensor], clock: Clock) -> None:
        """Keep the open block."""
        state.keep({"k": new["k"], "v": new["v"]}, (clock.position[:, -1] + 1) % self.config.span, clock)
        q = rows["q"].detach()
        behind = torch.arange(q.shape[2], 0, -1, device=q.device)
        kept = (behind <= state.kept_B[:, None])[:, None, :, None]
        # Where no block is open nobody reads the peak, but it has to be a number.
        state.peak = q.masked_fill(~kept, -torch.inf).amax(2, keepdim=True).nan_to_num(neginf=0.0)

    def vectors_kept(self, length: int) -> int:
        """The largest query of the open block."""
        return 1 if length % self.config.span else 0


class LogsparseCombiner(SpanCombiner, pattern="logsparse"):
    """Itself, and for each set bit of its position the abstraction of a span as long as that power of two: the query at
    13 = 8 + 4 + 1 meets 13, [12, 13), [8, 12) and [0, 8).

    So behind each token one span ends, as long as the lowest set bit of the number of tokens until there. A state holds
    k, v and the largest query of every token, since a later span may begin with the first. Under a limit, spans longer
    than the largest power of two within it are made of so many of their last tokens.
    """

    def death(self, clock: Clock) -> Tensor:
        """At once."""
        return clock.time[:, None] + 1

    def lengths(self, count: int, limit: int | None) -> list[tuple[int, int]]:
        """The powers of two: every other block, and every one of the longest that a limit allows."""
        longest = _longest(limit)
        powers = [1 << bit for bit in range(min(count, longest).bit_length())]
        return [(power, 1 if power == longest else 2) for power in powers]

    def size(self, reach: Tensor, limit: int | None) -> Tensor:
        """The lowest set bit."""
        return (reach & -reach).clamp(max=_longest(limit))

    def lifespan(self, reach: Tensor) -> Tensor:
        """The lowest set bit: as many steps on a longer span has taken it in."""
        return reach & -reach

    def needed(self, clock: Clock) -> int:
        """As far back as a span goes that ends among them, if a later token of the row can meet it."""
        behind = clock.time + 1
        met = behind < clock.whole.time.shape[1]
        if clock.end is not None:
            met = met & (behind < clock.end)
        return _reach_back(self.size(clock.position + 1, None).where(met, 0))

    def recall(self, state: SpanState, new: dict[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        """As far back as a span goes that ends among the new tokens."""
        return state.tail.before(new, min(_reach_back(self.size(clock.position + 1, state.limit)), state.tail.size))

    def remember(self, state: SpanState, new: dict[str, Tensor], rows: dict[str, Tensor], clock: Clock) -> None:
        """Keep the document, or what the longest span needs beside the token that completes it."""
        state.keep(new, (clock.position[:, -1] + 1).clamp(max=_longest(state.limit) - 1), clock)

    def vectors_kept(self, length: int) -> int:
        """Query, key and value of every token."""
        return 3 * length


def _reach_back(size: Tensor) -> int:
    """How far spans of these lengths [B or 1, T], which end at the tokens, reach back before the first of them."""
    token = torch.arange(1, size.shape[1] + 1, device=size.device)
    return max(0, int((size - token).max()))


def _longest(limit: int | None) -> int:
    """The largest power of two that is at most the limit."""
    return 1 << ((FOREVER if limit is None else limit).bit_length() - 1)
