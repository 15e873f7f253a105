"""InAttention: keys and values of every layer come from the initial states x0, the embedding output.

Source: Eisner, "InAttention: Linear Context Scaling for Transformers" (2024, arXiv 2410.07063). Only its abstract was
at hand: the formulas here are derived from it, and where it is silent (positions, the norm of x0, which the model sets)
the choice is ours.

One tensor x0 [T, d] is the decode cache of the whole model. Training costs what dense attention costs. Expect weak
recall: the key of token j holds token j alone, so no layer can put "what came before me" into a key, and induction
(find the earlier copy, read what follows it) has to come through the queries.

Shapes: B batch, T new tokens, N tokens in the cache, d model width, H query heads, G key heads, D head width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.cache import LivingKeys
from attention.clock import Clock, read_clock
from attention.dense import Dense
from attention.earlier import EarlierKeys, earlier
from attention.lifetimes import Lifetimes
from attention.mixer import Context, Cost, MixerOutput, floating, register, setting
from attention.ops.attend import attend
from attention.ops.rotary import apply_rotary
from attention.softmax import AttentionConfig


@dataclass
class InAttentionConfig(AttentionConfig):
    """Settings of `inattention`. `rotary` is the base of positions: rotary, and unused with the others."""

    positions: Literal["alibi", "rotary", "none"] = setting(
        "alibi", "what tells positions: a bias that grows along the keys, rotary (of base `rotary`), or nothing"
    )
    cache: Literal["initial", "keys"] = setting(
        "initial", "what decoding keeps: the initial states, once for all layers; or keys and values in each layer"
    )

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Rules that hold between settings: (setting, message) for each one broken."""
        if self.positions != "rotary":
            return AttentionConfig.problems(dataclasses.replace(self, rotary=0.0), dim)
        found = super().problems(dim)
        if self.rotary == 0:
            found.append(("rotary", "rotary must be a base > 1 with positions rotary, got 0"))
        if self.cache != "keys":
            message = f"cache {self.cache} cannot hold the rotated keys of positions rotary; set cache keys"
            found.append(("cache", message))
        return found


@register("inattention")
class InAttention(Dense):
    """Full causal attention to the initial states: one decode cache [T, d] for the whole model.

    q = x W_q, k = x0 W_k, v = x0 W_v, where x0 = `ctx.initial` as given, or x without it: then this is `dense`, whose
    weights it has. ALiBi (Press et al. 2108.12409, section 3) has a slope 2^(-8 (g + 1) / G) for each key head g. Its
    bias is rounded to float32: by 5e-4 at position 8k, by 8e-3 at 131k for slope 1/2. Train longer rows with positions
    rotary or none. Decoding counts from the new tokens and stays exact where a key counts.
    """

    Config = InAttentionConfig

    def __init__(self, dim: int, config: InAttentionConfig) -> None:
        super().__init__(dim, config)
        self.shared_state = "initial states" if config.cache == "initial" else None

    def forward(
        self, x: Tensor, ctx: Context | None = None, state: InitialStates | LivingKeys | None = None
    ) -> MixerOutput:
        """y [B, T, d] from x and ctx.initial [B, T, d]; see `Mixer.forward`. ValueError where their shapes differ."""
        clock = read_clock(x, ctx, None if state is None else state.stream)
        x0 = _initial(x, ctx)
        w_q, w_kv = self.qkv.weight.split([self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim])
        q = self._heads(F.linear(x, w_q))
        life = clock.once(self.alike, lambda: self.lifetimes(clock))

        absorb = isinstance(state, InitialStates) and self._absorbing_is_cheaper(x.shape[1])
        w_k, w_v = w_kv.view(2, self.kv_heads, self.head_dim, self.dim)
        if isinstance(state, InitialStates):
            x0, life = state.extend(x0.to(q.dtype), life, clock)
        if absorb:
            out = _per_key_head(self._meet_initial(_per_key_head(q, w_k), x0, life, clock), w_v.mT)
        else:
            k, v = map(self._heads, F.linear(x0, w_kv).chunk(2, -1))
            past = state if isinstance(state, InitialStates) else earlier(state, clock, self.alike, self.lifetimes)
            out = self._meet_keys(q, k, v, life, clock, past)
        return MixerOutput(self.merged(out), {})

    def _meet_keys(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        life: Lifetimes,
        clock: Clock,
        state: InitialStates | LivingKeys | EarlierKeys | None,
    ) -> Tensor:
        """Outputs of the heads [B, H, T, D], from q [B, H, T, D] and k, v [B, G, T or N, D]."""
        if self.config.positions == "rotary":
            table = clock.rotary(self.head_dim, self.config.rotary)
            q, k = apply_rotary(q, table), apply_rotary(k, table)
        if isinstance(state, EarlierKeys) and self.trades_heads(k, state):
            row = clock.whole
            return self.mix_by_heads(q, k, v, clock, self._bias(self.lifetimes(row), row, floating(q)))
        if isinstance(state, LivingKeys | EarlierKeys):
            k, v, life = state.extend(k, v, life, clock)
            state.advance(clock)
        bias = self._bias(life, clock, floating(q))
        return attend(q, k, v, life, time=clock.query_time, key_bias=bias, scale=self.head_dim**-0.5)[0]

    def _meet_initial(self, q: Tensor, x0: Tensor, life: Lifetimes, clock: Clock) -> Tensor:
        """A x0 [B, H, T, d], from q W_k^T [B, H, T, d] and x0 [B, N, d], which is key and value of every head."""
        meet = partial(attend, time=clock.query_time, scale=self.head_dim**-0.5)
        bias = self._bias(life, clock, floating(q))
        if bias is None:
            return meet(q, x0[:, None], x0[:, None], life)[0]
        # A key head for each slope. Row by row, for it is a view of the row; several rows would have to be copied.
        of_rows = (t.expand(len(x0), *t.shape[1:]).split(1) for t in (q, x0, life.birth, life.death, bias))
        outs = []
        for row_q, row, birth, death, row_bias in zip(*of_rows, strict=True):
            k = row[:, None].expand(-1, self.kv_heads, -1, -1)
            outs.append(meet(row_q, k, k, Lifetimes(birth, death), key_bias=row_bias)[0])
        return torch.cat(outs)

    def _absorbing_is_cheaper(self, new: int) -> bool:
        """Whether `new` queries should meet x0 itself, (q W_k^T) x0^T and (A x0) W_v, at 4 H d a pair.

        The other way makes keys and values of every cached token, 4 d G D each, for 4 H D a pair.
        """
        return new * self.heads * (self.dim - self.head_dim) < self.dim * self.kv_heads * self.head_dim

    def _bias(self, life: Lifetimes, clock: Clock, dtype: torch.dtype) -> Tensor | None:
        """With alibi, for each key head and key [B or 1, G, N], the slope times the key's place in the document.

        The query's part cancels in the softmax, and so would any constant of the document: places are counted from
        its start, or from the first new token if that is later, so that keys near the queries have small numbers.
        """
        if self.config.positions != "alibi":
            return None
        old = life.birth.shape[-1] - clock.time.shape[1]
        origin = F.pad(clock.starts.clamp(min=clock.now), (old, 0), value=clock.now)
        head = torch.arange(1, self.kv_heads + 1, dtype=torch.float64, device=origin.device)
        return (2.0 ** (-8.0 * head[:, None] / self.kv_heads) * (life.birth - origin[:, None])).to(dtype)

    def init_state(self, batch: int, limit: int | None = None) -> Any:
        """An empty cache for `batch` sequences: `InitialStates`, which other layers may share, or `LivingKeys`."""
        if self.config.cache == "keys":
            return super().init_state(batch, limit)
        return InitialStates(_Rows(batch, self.qkv.weight.device, limit))

    def cost(self, length: int) -> Cost:
        """As dense; the state of cache initial is T d numbers, of which a model keeps one copy for all layers."""
        cost = super().cost(length)
        if self.config.cache == "keys":
            return cost
        return dataclasses.replace(cost, state_bytes=length * self.dim * self.qkv.weight.element_size())


class InitialStates:
    """The cache of one layer: a view of initial states [B, N, d] that all layers of a model keep together.

    Each layer has its own stream. The first one to meet new tokens appends them, for all.
    """

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self._rows.layers += 1
        self.stream = rows.keys.stream

    def of_another_layer(self) -> InitialStates:
        """The state of another layer that reads the same initial states, from the first token on."""
        assert self._rows.keys.stream.now == 0, "layers share initial states from before the first token on"
        return InitialStates(self._rows)

    def extend(self, x0: Tensor, life: Lifetimes, clock: Clock) -> tuple[Tensor, Lifetimes]:
        """With x0 [B, T, d] of new tokens behind them, all [B, N, d] that their queries may meet, and the lifetimes."""
        self.stream = clock.after(len(x0))
        return self._rows.extend(x0, life, clock)

    @property
    def bytes(self) -> int:
        """Bytes of the living rows, the same for all layers that share them."""
        return self._rows.keys.bytes

    @property
    def capacity(self) -> int:
        """Bytes allocated, padding included."""
        return self._rows.keys.capacity


class _Rows:
    """The rows behind the views; what the first layer of a pass was given is at hand until the last has come."""

    def __init__(self, batch: int, device: torch.device, limit: int | None) -> None:
        self.keys = LivingKeys(batch, device, limit)  # x0 as its keys, with values of no width
        self.layers = 0
        self._waiting = 0
        self._given: tuple[Tensor, Lifetimes] | None = None

    def extend(self, x0: Tensor, life: Lifetimes, clock: Clock) -> tuple[Tensor, Lifetimes]:
        if clock.now == self.keys.stream.now:
            rows = x0[:, None]
            rows, _, life = self.keys.extend(rows, rows[..., :0], life, clock)
            self.keys.advance(clock)
            self._given, self._waiting = (rows[:, 0], life), self.layers
        given = self._given if clock.now + x0.shape[1] == self.keys.stream.now else None
        assert given is not None, "layers that share initial states must read the same tokens"
        self._waiting -= 1
        if self._waiting == 0:  # keep no graph and no outgrown buffer between passes
            self._given = None
        return given


def _initial(x: Tensor, ctx: Context | None) -> Tensor:
    if ctx is None or ctx.initial is None:
        return x
    if ctx.initial.shape != x.shape:
        raise ValueError(f"ctx.initial must have shape {list(x.shape)} as x, got {list(ctx.initial.shape)}")
    return ctx.initial


def _per_key_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, H, T, m] times the matrix of its key head, weight [G, m, n] -> [B, H, T, n]."""
    grouped = x.unflatten(1, (len(weight), -1))
    return torch.einsum("bgrtm,gmn->bgrtn", grouped, weight).flatten(1, 2)
