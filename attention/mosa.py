"""MoSA, mixture of sparse attention: many heads, each of which attends among the few tokens that its router chose.

Source: Piekos, Csordas, Schmidhuber, "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via
Expert-Choice Routing" (2025, arXiv 2505.00315), and piotrpiekos/MoSA. There a head chooses the best tokens of the whole
sequence, so whether a token is chosen tells what comes later (`selection: paper`). Here, by default, it is chosen if it
is among the best so far.

Shapes: B batch, T new tokens, H heads, n places of a head's list of chosen tokens, d model width, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attention.cache import take_rows
from attention.clock import Clock, Stream, read_clock
from attention.debug import check_finite
from attention.earlier import shard_of, side_by_side
from attention.lifetimes import FOREVER, Lifetimes, by_lifespan
from attention.mixer import (
    Context,
    Cost,
    Mixer,
    MixerOutput,
    init_fan_in,
    no_weight_decay,
    parameter_count,
    register,
    report,
    residual_output,
    setting,
    wide_linear,
)
from attention.ops.attend import attend
from attention.ops.project import gather_project, scatter_project
from attention.ops.rotary import apply_rotary, rotary_table
from attention.ops.select import listed, streaming_top_k
from attention.shard import Travel, bounds, gather_tokens
from attention.statistics import binary_entropy, share

EDGES = {False: (8, 64), True: (2, 8, 32)}
"""Lifespans that part the generations of keys, in units of `keep`: of short lists, and of those from 512 on."""

DEAD_GATE = 0.01
"""A head whose gates are smaller than this on average adds next to nothing."""


@dataclass
class MosaConfig:
    """Settings of `mosa`."""

    heads: int = setting(8, "heads, each with a router and projections of its own", at_least=1)
    head_dim: int = setting(64, "width of a head, at most dim", at_least=1)
    keep: int = setting(64, "tokens that a head keeps: sparsity is T / keep", at_least=1)
    include_first: bool = setting(True, "every head keeps the first token of a document, as one of its tokens")
    selection: Literal["strict", "paper"] = setting(
        "strict", "strict: the best so far; paper: the best of the whole sequence, which sees ahead"
    )
    rotary: float = setting(10000.0, "base of the rotary positions; 0 = off", at_least=0)
    rotary_fraction: float = setting(0.5, "share of a head's features that rotate, at most 1", at_least=0)

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Rules that hold between settings: (setting, message) for each one broken."""
        found = []
        if self.keep < 2 and self.include_first:
            found.append(("keep", f"keep {self.keep} must be >= 2 while include_first is true; or set it to false"))
        if 0 < self.rotary <= 1:
            found.append(("rotary", f"rotary must be a base > 1, or 0 = off; got {self.rotary}"))
        if self.rotary_fraction > 1:
            found.append(("rotary_fraction", f"rotary_fraction must be <= 1, got {self.rotary_fraction}"))
        elif self.rotated(dim) % 2:
            message = f"rotary_fraction {self.rotary_fraction} of {self.width(dim)} features must be an even number"
            found.append(("rotary_fraction", f"{message}, got {self.rotated(dim)}"))
        return found

    def width(self, dim: int) -> int:
        """head_dim, as far as dim goes."""
        return min(self.head_dim, dim)

    def rotated(self, dim: int) -> int:
        """How many features of a head rotate."""
        return round(self.width(dim) * self.rotary_fraction) if self.rotary else 0


@register("mosa")
class Mosa(Mixer):
    """A head serves the tokens that score best for it so far; of equal ones the newest.

    s = x W_r; a token is active in a head if fewer than `keep` tokens before it in its document are better. Then it has
    a query, and a key that lives until there are `keep` better ones. Active tokens give sigmoid(s) attention(q, k, v)
    W_o, all others 0; y is the sum over heads. How many are active has no limit: of T in random order about
    keep (1 + ln(T / keep)), of ever better ones all. The router learns through sigmoid(s) alone.
    """

    Config = MosaConfig
    sequence_parallel = "scores of all tokens, and the keys still kept"

    @classmethod
    def of(cls, dim: int, config: MosaConfig) -> Mixer:
        """`Mosa`, or `PaperMosa`."""
        return PaperMosa(dim, config) if config.selection == "paper" else Mosa(dim, config)

    def __init__(self, dim: int, config: MosaConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.heads, self.head_dim = dim, config.heads, config.width(dim)
        self.router = init_fan_in(nn.Linear(dim, self.heads, bias=False))
        no_weight_decay(self.router.weight)
        self.qkv = nn.Parameter(torch.randn(self.heads, dim, 3 * self.head_dim) * dim**-0.5)
        self.output = nn.Parameter(torch.randn(self.heads, self.head_dim, dim) * (self.heads * self.head_dim) ** -0.5)
        residual_output(self.output)

    def forward(self, x: Tensor, ctx: Context | None = None, state: ChosenKeys | None = None) -> MixerOutput:
        """y [B, T, d] from x [B, T, d]; see `Mixer.forward`."""
        clock = read_clock(x, ctx, None if state is None else state.stream)
        past = EarlierChoice(self) if clock.shard is not None else state
        score = self.scores(x)
        check_finite(ctx, "router scores", score)
        lost = score.isnan().any(1)
        death = self.deaths(score, clock) if past is None else past.compete(score, clock)
        index, life = self.chosen(death, clock)
        place = index.clamp(min=0)
        score, time = score.gather(-1, place), life.birth
        report(ctx, lambda: self._statistics(index, score.sigmoid(), clock))

        q, k, v = gather_project(x, index, self.qkv).chunk(3, -1)
        q, k = self._rotate(q, k, clock, place)
        if past is not None:
            k, v, life = past.extend(k, v, score, life, clock)
        out, _ = attend(q, k, v, life, time=time)
        y = scatter_project(out, index, score.sigmoid(), self.output, x.shape[1])
        # Whose score is no number was chosen by no head, and must not pass for that.
        return MixerOutput(y.masked_fill(lost[..., None], torch.nan), {})

    def scores(self, x: Tensor) -> Tensor:
        """The routers' scores [B, H, T] of x [B, T, d], in at least float32: rounded to 16 bits many would tie."""
        return wide_linear(x, self.router.weight).transpose(1, 2)

    def deaths(self, score: Tensor, clock: Clock) -> Tensor:
        """When the keys die that all tokens would have, int64 [B, H, T]; the inactive at their own time."""
        start = None if clock.end is None else clock.starts[:, None]
        config = self.config
        death = streaming_top_k(score, config.keep, start=start, include_first=config.include_first)
        return death if clock.end is None else torch.minimum(death, clock.end[:, None])

    def chosen(self, death: Tensor, clock: Clock) -> tuple[Tensor, Lifetimes]:
        """The active tokens of each head, int64 [B, H, n] filled up with -1, and the lifetimes of their keys."""
        index = listed(death > clock.time[:, None])
        nobody, place = index < 0, index.clamp(min=0)
        birth = (place + clock.now).masked_fill(nobody, FOREVER)
        death = death.gather(-1, place).masked_fill(nobody, FOREVER)
        end = clock.now + clock.time.shape[1]
        return index, Lifetimes(birth.int(), death.int(), _generations(birth, death, self.config.keep, end))

    def _rotate(self, q: Tensor, k: Tensor, clock: Clock, place: Tensor) -> tuple[Tensor, Tensor]:
        """q and k [B, H, n, D] turned by the positions of the tokens at `place` [B, H, n]."""
        rotated = self.config.rotated(self.dim)
        if not rotated:
            return q, k
        position = clock.position[:, None].expand(*place.shape[:2], -1).gather(-1, place)
        table = rotary_table(position, rotated, self.config.rotary)
        return apply_rotary(q, table), apply_rotary(k, table)

    def _statistics(self, index: Tensor, gate: Tensor, clock: Clock) -> dict[str, Tensor]:
        """See docs/watching.md; of the active tokens at `index` [B, H, n] (-1: nobody) and their gates."""
        active = index >= 0
        served = active.sum(2)  # [B, H]
        expected = self._chance(clock.position).sum(1, keepdim=True)  # [B or 1, 1]
        gate = gate.masked_fill(~active, 0.0)
        of_head = gate.sum((0, 2)) / served.sum(0).clamp(min=1)
        of_head_and_row = served / clock.time.shape[1]
        return {
            "active_share": of_head_and_row.mean(),
            "busiest_head": of_head_and_row.mean(0).max(),
            "overflow": (served / expected).max(),
            "gate": gate.sum() / served.sum().clamp(min=1),
            "router_entropy": binary_entropy(gate).sum() / served.sum().clamp(min=1),
            "dead_heads": share(of_head < DEAD_GATE),
        }

    def init_state(self, batch: int, limit: int | None = None) -> Any:
        """An empty `ChosenKeys` for `batch` sequences."""
        return ChosenKeys(batch, self.router.weight.device, self.config, limit)

    def cost(self, length: int) -> Cost:
        """parameters H(4dD + d), flops H[8dD active + 2Td] + 4D pairs, state = min(T, keep) rows per head.

        Active tokens and pairs as expected of scores in random order; the state has 8 bytes per row besides k and v.
        """
        active, pairs = self._expected(length)
        rows = self.heads * min(length, self.config.keep)
        return Cost(
            parameters=parameter_count(self),
            flops=self.heads * (8 * self.dim * self.head_dim * active + 2 * length * self.dim)
            + 4 * self.head_dim * self.heads * pairs,
            pairs=self.heads * pairs,
            state_bytes=rows * (2 * self.head_dim * self.qkv.element_size() + 8),
        )

    def _expected(self, length: int) -> tuple[float, float]:
        """Of a head and one document: active tokens, and (query, key) pairs."""
        position = torch.arange(length, device="cpu")
        chance = self._chance(position)
        met = (position + 1).clamp(max=self.config.keep)
        return float(chance.sum()), float((chance * met).sum())

    def _chance(self, position: Tensor) -> Tensor:
        """The probability that tokens at these positions (int64) are active if scores come in random order, float64.

        The j-th of those that compete for u places is among the best u with probability min(1, u / j).
        """
        first = int(self.config.include_first)
        rank = (position + 1 - first).clamp(min=1)  # at position 0, which then does not compete, the chance is 1
        return ((self.config.keep - first) / rank.double()).clamp(max=1.0)


class PaperMosa(Mosa):
    """The published selection: a head serves the best tokens of the whole sequence, so it sees ahead."""

    causality = "selects_ahead"

    def forward(self, x: Tensor, ctx: Context | None = None, state: ChosenKeys | None = None) -> MixerOutput:
        """y [B, T, d] from x [B, T, d], one document per row; ValueError for packed documents or a state."""
        if state is not None:
            raise ValueError(_NO_STATE)
        return super().forward(x, ctx)

    def deaths(self, score: Tensor, clock: Clock) -> Tensor:
        """Never for the best of all T tokens; any other is never alive."""
        if clock.end is not None and bool((clock.end < FOREVER).any()):
            raise ValueError(
                "mosa with selection paper chooses among all tokens of a row: it takes no packed documents"
            )
        death = super().deaths(score, clock)
        return torch.where(death == FOREVER, death, clock.time[:, None])

    def init_state(self, batch: int, limit: int | None = None) -> Any:
        """Always a ValueError: earlier outputs depend on later tokens."""
        raise ValueError(_NO_STATE)

    def cost(self, length: int) -> Cost:
        """As of `Mosa`, with min(T, keep) active tokens; without a state."""
        cost = super().cost(length)
        return Cost(cost.parameters, cost.flops, cost.pairs, 0)

    def _expected(self, length: int) -> tuple[float, float]:
        active = min(length, self.config.keep)
        return active, active * (active + 1) / 2

    def _chance(self, position: Tensor) -> Tensor:
        """The same for every token of a row."""
        length = position.shape[-1]
        return torch.full_like(position, min(length, self.config.keep) / length, dtype=torch.float64)


_NO_STATE = "mosa with selection paper has no state: whom it chose changes with every token, so read the prefix anew"


class ChosenKeys:
    """The decode cache: of each head the tokens that compete, at most `keep`, in the order of time.

    k and v [B, H, N, D]; score, birth and death [B, H, N]; heads with fewer tokens are filled up with birth FOREVER.
    With a `limit` no query meets a key that is that many steps old; its token still competes, as it would without.
    """

    def __init__(self, batch: int, device: torch.device, config: MosaConfig, limit: int | None) -> None:
        self.config, self.limit = config, limit
        self.stream = Stream(0, torch.zeros(batch, dtype=torch.int64, device=device))
        self.rows: dict[str, Tensor] = {}

    def compete(self, score: Tensor, clock: Clock) -> Tensor:
        """Deaths of the new tokens with these scores [B, H, T], int64 [B, H, T], as of `Mosa.deaths`."""
        new = score.shape[2]
        time, start = (t[:, None].expand(score.shape) for t in (clock.time, clock.starts))
        if self.rows:
            began = self.stream.start_B[:, None, None].expand_as(self.rows["birth"])
            start = torch.cat([began, start], 2)
            score, time = (torch.cat([self.rows[name], t], 2) for name, t in (("score", score), ("birth", time)))
        config = self.config
        death = streaming_top_k(score, config.keep, start=start, time=time, include_first=config.include_first)
        old, death = death.tensor_split([death.shape[2] - new], 2)
        if self.rows:  # the documents of earlier tokens end where the first new document begins
            self.rows["death"] = torch.minimum(old, clock.first_start_B[:, None, None])
        return death if clock.end is None else torch.minimum(death, clock.end[:, None])

    def extend(
        self, k: Tensor, v: Tensor, score: Tensor, life: Lifetimes, clock: Clock
    ) -> tuple[Tensor, Tensor, Lifetimes]:
        """Behind `compete`: add the keys of the active tokens; returns all that their queries may meet.

        Stored without gradient, and moved on: who is dead behind the new tokens is forgotten.
        """
        rows = {"k": k, "v": v, "score": score, "birth": life.birth.long(), "death": life.death.long()}
        if self.rows:
            rows = {name: torch.cat([self.rows[name], t], 2) for name, t in rows.items()}
        self.stream = clock.after(len(k))
        self._keep(rows)
        birth, death = rows["birth"], rows["death"]
        if self.limit is not None:
            death = torch.minimum(death, birth + self.limit)
        generation = _generations(birth, death, self.config.keep, self.stream.now)
        return rows["k"], rows["v"], Lifetimes(birth.int(), death.int(), generation)

    def _keep(self, rows: dict[str, Tensor]) -> None:
        """Of the rows those that still compete."""
        alive = (rows["death"] > self.stream.now) & (rows["birth"] < FOREVER)
        order = (~alive).to(torch.int8).argsort(dim=2, stable=True)[:, :, : self.config.keep]
        self.rows = {name: take_rows(given.detach(), order) for name, given in rows.items()}
        self.rows["birth"].masked_fill_(~alive.gather(2, order), FOREVER)

    @property
    def bytes(self) -> int:
        """Bytes of the living rows, over all sequences: keys, values, and 8 for score and position."""
        if not self.rows:
            return 0
        oldest = -1 if self.limit is None else self.stream.now - self.limit
        alive = (self.rows["birth"] > oldest) & (self.rows["birth"] < FOREVER)
        return int(alive.sum()) * (2 * self.rows["k"].shape[-1] * self.rows["k"].element_size() + 8)

    @property
    def capacity(self) -> int:
        """Bytes allocated, padding included."""
        return sum(rows.nbytes for rows in self.rows.values())


class EarlierChoice:
    """The tokens of a whole row, of which this process has a shard, in the place of `ChosenKeys`: all ranks learn all
    scores, and so who lives how long; then the keys travel that outlive their shard."""

    def __init__(self, mixer: Mosa) -> None:
        self.mixer = mixer

    def compete(self, score: Tensor, clock: Clock) -> Tensor:
        """See `ChosenKeys.compete`."""
        scores = gather_tokens(shard_of(clock), score.detach(), 2)
        self.death = self.mixer.deaths(scores, clock.whole)
        return self.death[..., clock.mine]

    def extend(
        self, k: Tensor, v: Tensor, score: Tensor, life: Lifetimes, clock: Clock
    ) -> tuple[Tensor, Tensor, Lifetimes]:
        """See `ChosenKeys.extend`; nothing is stored."""
        shard = shard_of(clock)
        row = Lifetimes(clock.whole.time[:, None].int(), self.death.int())
        parts = [slice(*bounds(shard, rank)) for rank in range(len(shard.lengths))]
        lives = [Lifetimes(row.birth[..., here], row.death[..., here]) for here in parts]
        lives[shard.rank] = life
        travel = Travel.of_living(shard, k, lives)
        k, v = travel.put_in_front(shard, k, v)
        before = slice(0, clock.now)
        birth = side_by_side([travel.take(row.birth[..., before], FOREVER), life.birth])
        death = side_by_side([travel.take(row.death[..., before], 0), life.death])
        end = clock.now + clock.time.shape[1]
        return k, v, Lifetimes(birth, death, _generations(birth.long(), death.long(), self.mixer.config.keep, end))


def _generations(birth: Tensor, death: Tensor, keep: int, end: int) -> Tensor:
    """int32: keys by how long they live until `end`, as the kernels work best.

    Of scores in random order: with tiles of 128 and keep 1024 or 512 at T = 65,536 they visit 1.8 and 2.3 places per
    pair, without generations 3.0 and 3.4. Shorter lists fill so few tiles that fewer generations waste less.
    """
    return by_lifespan(birth, death, end, [edge * keep for edge in EDGES[keep >= 512]])
