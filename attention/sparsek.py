"""SPARSEK: beside a window, the older tokens that a learnt score selects, softly and differentiably.

Source: Lou et al., "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers" (2024,
arXiv 2406.16747): the projection of all scores so far onto {0 <= c <= 1, sum of c = keep} selects. There keys and
values are multiplied by c, so a key that leaves jumps from the logit 0 to -inf; here c is a factor of its weight, and
it fades out.

Shapes: B batch, G key heads, H = G r query heads, T new tokens, N tokens with those of a state, D head width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.cache import take_rows
from attention.clock import Clock, Stream, read_clock
from attention.debug import check_finite
from attention.earlier import shard_of, side_by_side
from attention.lifetimes import FOREVER, Lifetimes, by_lifespan
from attention.mixer import (
    Context,
    Cost,
    MixerOutput,
    init_fan_in,
    no_weight_decay,
    register,
    report,
    setting,
    wide_linear,
)
from attention.ops.attend import KeySet, attend_union
from attention.ops.sparsek import partial_from, sparsek_threshold
from attention.shard import Travel, bounds, gather_tokens
from attention.softmax import AttentionConfig, ProjectedHeads

EDGES = (1, 8, 64)
"""Lifespans that part the generations of selected keys, in units of `keep`. Of independent scores, at T = 32,768 and
with tiles of 128, the kernels visit 5.2, 2.6 and 2.0 places per pair for keep 64, 256 and 1,024; without generations
185, 49 and 13."""


@dataclass
class SparsekConfig(AttentionConfig):
    """Settings of `sparsek`."""

    keep: int = setting(64, "what the shares of the selected tokens sum to", at_least=1)
    window: int = setting(64, "the last tokens, met whole and never by selection; 0 = none", at_least=0)
    candidates: int | None = setting(
        None, "so many older tokens at most take part in the selection, those of the best scores; null = 2 keep"
    )
    score_scale: float = setting(4.0, "factor of the scores: the larger, the fewer tokens share; > 0")
    slope: float = setting(0.0, "added to a score per position: the larger, the more recent tokens count", at_least=0)

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Rules that hold between settings: (setting, message) for each one broken."""
        found = super().problems(dim)
        if self.most < self.keep:
            found.append(("candidates", f"candidates {self.candidates} must be >= keep {self.keep}, or null"))
        if self.score_scale <= 0:
            found.append(("score_scale", f"score_scale must be > 0, got {self.score_scale}"))
        return found

    @property
    def most(self) -> int:
        """candidates, filled in."""
        return 2 * self.keep if self.candidates is None else self.candidates


@register("sparsek")
class Sparsek(ProjectedHeads):
    """A query meets the last `window` tokens, and of the older ones those whose score exceeds a threshold, by degrees.

    With u = score_scale x W_u + slope position, a number for each key head, the weight of an older token j at t is
    c_tj exp(logit), c_tj = clip(u_j - tau_t, 0, 1), beside the weights exp(logit) of the window. tau_t is such that the
    c of the best `candidates` among the tokens up to t - window sum to `keep` (all are 1 if there are no more than
    that). It never falls, so a token fades out once and for all: it is a key with a lifetime. The scores learn through
    c, exactly, tau included. All c are 1 or 0, and nothing is learnt, where `candidates` = `keep`.
    """

    Config = SparsekConfig
    sequence_parallel = "scores of all tokens; the window, and the selected tokens"

    def __init__(self, dim: int, config: SparsekConfig) -> None:
        super().__init__(dim, config)
        self.router = init_fan_in(nn.Linear(dim, self.kv_heads, bias=False))  # W_u
        no_weight_decay(self.router.weight)

    def forward(self, x: Tensor, ctx: Context | None = None, state: Candidates | None = None) -> MixerOutput:
        """y [B, T, d] from x [B, T, d]; see `Mixer.forward`."""
        clock, config = read_clock(x, ctx, None if state is None else state.stream), self.config
        q, k, v = self.project(x)
        scores = self.scores(x, clock)
        check_finite(ctx, "scores", scores)
        rows = Rows.of(self.turned(k, clock), v, scores, clock)
        if clock.shard is not None:
            rows, tau, death = self._of_row(rows, clock, ctx)
        else:
            if state is not None:
                rows = state.before(rows, clock)
            tau, leaves = self._threshold(rows.u, rows.start)
            if state is not None:
                state.hold(rows, leaves, clock)
            report(ctx, lambda: _statistics(rows.u, rows.start, tau, leaves, clock, config))
            death = rows.time_of(leaves)
        limit = None if state is None else state.limit
        out = self._meet(self.turned(q, clock), rows, tau[..., -x.shape[1] :], death, clock, limit)
        return MixerOutput(self.merged(out), {})

    def _threshold(self, u: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        config = self.config
        return sparsek_threshold(u, config.keep, config.most, delay=config.window, start=start)

    def _of_row(self, own: Rows, clock: Clock, ctx: Context | None) -> tuple[Rows, Tensor, Tensor]:
        """Of a shard: all ranks learn all scores, and so tau and who leaves when; then the rows travel that somebody
        meets. Returns those that come and the own, tau [B, G, T] of the own, and the times at which rows die."""
        shard, row = shard_of(clock), clock.whole
        u = gather_tokens(shard, own.u, 2)
        start = None if row.end is None else row.starts[:, None]
        tau, death = self._threshold(u, start)  # of the whole row, where a token's number is its time
        report(ctx, lambda: _statistics(u, start, tau, death, row, self.config))
        # A token is met by its window, and then as long as it is selected: until it leaves.
        time, parts = row.time[:, None], [slice(*bounds(shard, rank)) for rank in range(len(shard.lengths))]
        lives = [Lifetimes(_int32(time[..., here]), _int32(death[..., here])) for here in parts]
        travel = Travel.of_living(shard, own.k, lives, front=True)
        k, v = travel.put_in_front(shard, own.k, own.v)

        def known(values: Tensor, fill: int) -> Tensor:
            return side_by_side([travel.take(values[..., : clock.now], fill), values[..., clock.mine]])

        end = None if row.end is None else known(row.end[:, None], 0)
        rows = Rows(k, v, known(u, 0), known(time, FOREVER), None, end)
        return rows, tau[..., clock.mine], known(death, 0)

    def scores(self, x: Tensor, clock: Clock) -> Tensor:
        """u [B, G, T] of x [B, T, d], in at least float32: rounded to 16 bits many would tie."""
        u = self.config.score_scale * wide_linear(x, self.router.weight).transpose(1, 2)
        return u + self.config.slope * clock.position[:, None].to(u.dtype) if self.config.slope else u

    def _meet(self, q: Tensor, rows: Rows, tau: Tensor, death: Tensor, clock: Clock, limit: int | None) -> Tensor:
        """Outputs of the heads [B, H, T, D] of q [B, H, T, D], with the tau [B, G, T] of its tokens, and the times
        [B, G, N] at which the keys beyond the window die; with a limit no key is met so many steps after its own."""
        window = self.config.window
        if limit is not None:
            death = torch.minimum(death, rows.time + limit)
        birth, tau = rows.time + window, tau.repeat_interleave(self.heads // self.kv_heads, 1)
        generation = by_lifespan(birth, death, clock.now + q.shape[2], [edge * self.config.keep for edge in EDGES])
        far = Lifetimes(_int32(birth), _int32(death), generation)
        sets = [KeySet(q, rows.k, rows.v, far, gate=(rows.u, tau))]
        if window:
            until = rows.until(rows.time + (window if limit is None else min(window, limit)))
            life = Lifetimes(_int32(rows.time), _int32(until))
            sets.append(KeySet(q, rows.k, rows.v, life))
        return attend_union(sets, time=clock.query_time)[0]

    def pairs(self, length: int) -> int:
        """At most so many (query, living key) pairs, over all query heads: as many as if no candidate were at c = 0."""
        window, most = self.config.window, self.config.most
        return self.heads * (_ramp(length, window) + _ramp(max(0, length - window), most))

    def cost(self, length: int) -> Cost:
        """parameters 2dD(H+G) + dG, flops 4TdD(H+G) + 2TdG + 4D pairs, state = min(T, window + candidates) rows.

        Pairs and state are bounds, for how many share a selection follows from the scores. A row has 8 bytes more than
        its k and v, for score and position.
        """
        rows = self.kv_heads * min(length, self.config.window + self.config.most)
        row = 2 * self.head_dim * self.qkv.weight.element_size() + 8
        cost = self.cost_of(length, self.pairs(length), rows * row)
        return dataclasses.replace(cost, flops=cost.flops + 2 * length * self.router.weight.numel())

    def init_state(self, batch: int, limit: int | None = None) -> Candidates:
        """Empty `Candidates` for `batch` sequences."""
        return Candidates(batch, self.qkv.weight.device, self.config, limit)


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokens, in the order of time. Lists that are shorter than others are filled up in front.

    k, v [B, G, N, D]; u [B, G, N]. int64, broadcast to [B, G, N]: time; start and end, when the token's document began
    and when it ends, FOREVER while unknown; None: none begins or ends. Padding has time FOREVER and start -1.
    """

    k: Tensor
    v: Tensor
    u: Tensor
    time: Tensor
    start: Tensor | None
    end: Tensor | None

    @staticmethod
    def of(k: Tensor, v: Tensor, u: Tensor, clock: Clock) -> Rows:
        """The new tokens."""
        if clock.end is None and clock.now == 0:
            return Rows(k, v, u, clock.time[:, None], None, None)
        end = torch.full_like(clock.position, FOREVER) if clock.end is None else clock.end
        return Rows(k, v, u, clock.time[:, None], clock.starts[:, None], end[:, None])

    def time_of(self, index: Tensor) -> Tensor:
        """The time of the token with that number; of FOREVER, FOREVER."""
        time = F.pad(self.time, (0, 1), value=FOREVER).expand(*index.shape[:2], -1)
        return time.gather(2, index.clamp(max=time.shape[2] - 1))

    def until(self, death: Tensor) -> Tensor:
        """Nobody outlives its document."""
        return death if self.end is None else torch.minimum(death, self.end)


class Candidates:
    """The decode cache: the last `window` tokens, and the older ones that a later query may meet.

    The others cannot matter: c sums up what is above the threshold, and that never falls. With a `limit` no query meets
    a key that is that many steps old; its token still competes, as it would without.
    """

    def __init__(self, batch: int, device: torch.device, config: SparsekConfig, limit: int | None) -> None:
        self.config, self.limit = config, limit
        self.stream = Stream(0, torch.zeros(batch, dtype=torch.int64, device=device))
        self.rows: dict[str, Tensor] = {}  # k, v, u, time of `Rows`; all are of the open document

    def before(self, new: Rows, clock: Clock) -> Rows:
        """The tokens held, and the new ones behind them."""
        if not self.rows:
            return new
        time = self.rows["time"]
        began = torch.where(time == FOREVER, -1, self.stream.start_B[:, None, None])
        ends = clock.first_start_B[:, None, None].expand_as(time)
        held = {**self.rows, "start": began, "end": ends}
        shape = new.u.shape
        joined = {}
        for name, rows in held.items():
            added = getattr(new, name)
            joined[name] = torch.cat([rows, added.expand(shape) if added.dim() == 3 else added], 2)
        return Rows(**joined)

    def hold(self, rows: Rows, leaves: Tensor, clock: Clock) -> None:
        """The new tokens are done: move on, and hold those of all `rows` that matter later, without gradient.

        leaves: as of `sparsek_threshold`. Whom the last query may meet the next one may, or they decide who leaves.
        """
        self.stream = clock.after(len(rows.u))
        alive = (leaves == FOREVER) & (rows.time < FOREVER)
        order = alive.to(torch.int8).argsort(dim=2, stable=True)
        order = order[:, :, order.shape[2] - int(alive.sum(2).max()) :]
        time = torch.where(alive, rows.time, FOREVER)
        held = {"k": rows.k, "v": rows.v, "u": rows.u, "time": time}
        self.rows = {name: take_rows(given.detach(), order) for name, given in held.items()}

    @property
    def bytes(self) -> int:
        """Bytes of the living rows, over all sequences: keys, values, and 8 for score and position."""
        if not self.rows:
            return 0
        oldest = -1 if self.limit is None else self.stream.now - self.limit
        alive = (self.rows["time"] > oldest) & (self.rows["time"] < FOREVER)
        return int(alive.sum()) * (2 * self.rows["k"].shape[-1] * self.rows["k"].element_size() + 8)

    @property
    def capacity(self) -> int:
        """Bytes allocated, padding included."""
        return sum(rows.nbytes for rows in self.rows.values())


def _ramp(length: int, most: int) -> int:
    """min(1, most) + min(2, most) + .. + min(length, most)."""
    rising = min(length, most)
    return rising * (rising + 1) // 2 + (length - rising) * most


def _statistics(
    u: Tensor, start: Tensor | None, tau: Tensor, leaves: Tensor, clock: Clock, config: SparsekConfig
) -> dict[str, Tensor]:
    """Of a query, on average: selected keys with c > 0 (`support`), with the window's (`alive_keys`), and how many of
    the selected have c < 1 (`interior_share`). And the share of queries at which a key leaves with c > 0, since there
    are better candidates (`candidates_bind_share`)."""
    total = u.shape[2]
    first = total - clock.time.shape[1]
    queries = tau[..., first:].numel()
    birth = (torch.arange(total, device=u.device) + config.window).expand(u.shape)
    partial = partial_from(u, tau, leaves, config.window)
    birth, partial, death = (t.clamp(first, total) for t in (birth, partial, leaves))
    support, interior = ((death - t).clamp(min=0).sum() / queries for t in (birth, partial))
    at = leaves.clamp(max=total - 1)
    bound = (leaves >= first) & (leaves < total) & (u > tau.gather(2, at))
    if start is not None:
        start = start.expand(u.shape)
        bound &= start.gather(2, at) == start
    return {
        "support": support,
        "alive_keys": support + (clock.position + 1).clamp(max=config.window).double().mean(),
        "interior_share": interior / support.clamp(min=1 / queries),
        "candidates_bind_share": bound.sum() / queries,
    }


def _int32(time: Tensor) -> Tensor:
    return time.clamp(max=FOREVER).to(torch.int32)
