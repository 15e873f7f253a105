"""What the softmax mixers over tokens share: projections, rotary positions, the cache, the cost.

Most need say one thing only: how long each token's key lives (`TokenAttention`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attention.cache import LivingKeys
from attention.clock import Clock, read_clock
from attention.divisors import nearest_divisors
from attention.earlier import EarlierKeys, earlier, shard_of
from attention.heads import HeadShare, of_heads, to_heads, to_tokens
from attention.lifetimes import FOREVER, Lifetimes, living_pairs
from attention.mixer import (
    Context,
    Cost,
    Mixer,
    MixerOutput,
    init_fan_in,
    parameter_count,
    residual_output,
    setting,
)
from attention.ops.attend import attend
from attention.ops.rotary import apply_rotary


@dataclass
class AttentionConfig:
    """Settings common to the softmax mixers."""

    heads: int = setting(8, "query heads", at_least=1)
    kv_heads: int | None = setting(
        None, "key and value heads, shared by groups of query heads; null = heads", at_least=1
    )
    head_dim: int | None = setting(None, "width of a head; null = dim / heads", at_least=1)
    rotary: float = setting(10000.0, "base of the rotary positions; 0 = off", at_least=0)

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Rules that hold between settings: (setting, message) for each one broken."""
        found = []
        if self.kv_heads is not None and self.heads % self.kv_heads:
            near = ", ".join(map(str, nearest_divisors(self.heads, self.kv_heads)))
            message = f"kv_heads {self.kv_heads} does not divide heads {self.heads}; nearest: {near}"
            found.append(("kv_heads", message))
        if self.head_dim is None and dim % self.heads:
            near = ", ".join(map(str, nearest_divisors(dim, self.heads)))
            message = f"heads {self.heads} does not divide dim {dim}; nearest: {near} (or set head_dim)"
            found.append(("heads", message))
        elif self.rotary and self.width(dim) % 2:
            found.append(("head_dim", f"head_dim {self.width(dim)} must be even while rotary is on"))
        if 0 < self.rotary <= 1:
            found.append(("rotary", f"rotary must be a base > 1, or 0 = off; got {self.rotary}"))
        return found

    def width(self, dim: int) -> int:
        """head_dim, filled in."""
        return dim // self.heads if self.head_dim is None else self.head_dim


class ProjectedHeads(Mixer):
    """The weights of softmax attention whose keys are the tokens themselves.

    q = x W_q, k = x W_k, v = x W_v (rows of `qkv`, in this order, head after head), y = concat(heads) W_o, no biases;
    matrices start at N(0, 1 / fan_in).
    Query head h reads key head h // (heads / kv_heads).
    """

    Config = AttentionConfig

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__()
        self.config = config
        self.heads: int = config.heads
        self.kv_heads: int = config.kv_heads or config.heads
        self.head_dim: int = config.width(dim)
        self.dim = dim
        # One product for W_q, W_k and W_v: three would cost a small model 5 % of its step.
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = init_fan_in(nn.Linear(dim, rows, bias=False))
        self.output = init_fan_in(nn.Linear(self.heads * self.head_dim, dim, bias=False))
        residual_output(self.output.weight)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D] and k, v [B, G, T, D] of x [B, T, d], not rotated."""
        # Split before the heads part: the gradients of the three are then joined along contiguous rows.
        widths = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = map(self._heads, self.qkv(x).split(widths, -1))
        return q, k, v

    def turned(self, x: Tensor, clock: Clock) -> Tensor:
        """x [B, heads, n, D], rotated by the positions of the clock's tokens."""
        return apply_rotary(x, clock.rotary(self.head_dim, self.config.rotary)) if self.config.rotary else x

    def merged(self, out: Tensor) -> Tensor:
        """y [B, T, d] of the outputs of the heads [B, H, T, D]."""
        y: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return y

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * D] -> [B, heads, T, D]."""
        return x.view(*x.shape[:2], x.shape[2] // self.head_dim, self.head_dim).transpose(1, 2)

    def cost_of(self, length: int, pairs: int, state_bytes: int) -> Cost:
        """parameters 2dD(H+G), flops 4TdD(H+G) + 4D pairs, and the state that was stated."""
        matrices = 2 * self.dim * self.head_dim * (self.heads + self.kv_heads)
        flops = 2 * length * matrices + 4 * self.head_dim * pairs
        return Cost(parameter_count(self), flops, pairs, state_bytes)


class SoftmaxAttention(ProjectedHeads):
    """Softmax attention of one call whose keys have lifetimes; a subclass says who meets whom, in which order."""

    sequence_parallel = "keys that outlive their shard"
    some_immortal: ClassVar[bool] = False
    """Some rows live to the end of their document and others do not: they are a generation of their own."""

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__(dim, config)
        self.alike = (type(self), self.kv_heads, repr(config))  # layers that share this share lifetimes

    @abstractmethod
    def death(self, clock: Clock) -> Tensor:
        """Time at which each token's row may be forgotten, were its document endless: int64, broadcast to [B, G, T]."""

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, clock: Clock, state: LivingKeys | EarlierKeys | None) -> Tensor:
        """Outputs of the heads [B, H, T, D], from q [B, H, T, D] and k, v [B, G, T, D] of the new tokens.

        With a state: adds the new rows to it, and meets those it holds. Of a shard, keys of lower ranks take its place.
        """

    @abstractmethod
    def pairs(self, length: int) -> int:
        """(query, living key) pairs of one document of `length` tokens, over all query heads."""

    def lifetimes(self, clock: Clock) -> Lifetimes:
        """Birth and death of the tokens' rows, int32 broadcast to [B, G, T]."""
        death = self.death(clock)
        generation = (death >= FOREVER).to(torch.int32) if self.some_immortal else None
        return Lifetimes(clock.time[:, None].to(torch.int32), clock.until(death), generation)

    def forward(self, x: Tensor, ctx: Context | None = None, state: LivingKeys | None = None) -> MixerOutput:
        """y [B, T, d] from x [B, T, d]; see `Mixer.forward`."""
        clock = read_clock(x, ctx, None if state is None else state.stream)
        q, k, v = self.project(x)
        past = earlier(state, clock, self.alike, self.lifetimes)
        out = self.mix(self.turned(q, clock), self.turned(k, clock), v, clock, past)
        if state is not None:
            state.advance(clock)
        return MixerOutput(self.merged(out), {})

    def init_state(self, batch: int, limit: int | None = None) -> LivingKeys:
        """An empty cache of living keys for `batch` sequences."""
        return LivingKeys(batch, self.qkv.weight.device, limit)

    def cost(self, length: int) -> Cost:
        """parameters 2dD(H+G), flops 4TdD(H+G) + 4D pairs, state = rows of the past that outlive it."""
        kept = self.lifetimes(Clock.plain(length, torch.device("cpu"))).death > length
        rows = int(kept.expand(1, self.kv_heads, length).sum())
        return self.cost_of(length, self.pairs(length), rows * 2 * self.head_dim * self.qkv.weight.element_size())


class TokenAttention(SoftmaxAttention):
    """Softmax attention in one call, over time: each key is alive from its own time to its death."""

    sequence_parallel = "keys that outlive their shard, or, if that is no more, heads for tokens"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, clock: Clock, state: LivingKeys | EarlierKeys | None) -> Tensor:
        """See `SoftmaxAttention.mix`."""
        if isinstance(state, EarlierKeys) and self.trades_heads(k, state):
            return self.mix_by_heads(q, k, v, clock)
        life = clock.once(self.alike, lambda: self.lifetimes(clock))
        if state is not None:
            k, v, life = state.extend(k, v, life, clock)
        return attend(q, k, v, life, time=clock.query_time)[0]

    def trades_heads(self, k: Tensor, past: EarlierKeys) -> bool:
        """Whether ranks trade tokens for heads instead of gathering keys: if the busiest one then sends no more.

        k [B, G, T, D]: of this rank. The answer is the same on all ranks.
        """
        lengths = shard_of(past.clock).lengths
        if self.heads < len(lengths):
            return False
        share = HeadShare(len(lengths), self.heads, self.kv_heads)
        traded = max(share.vectors_sent(rank, lengths) for rank in range(len(lengths)))
        return len(k) * traded <= 2 * past.most_sent(k)

    def mix_by_heads(self, q: Tensor, k: Tensor, v: Tensor, clock: Clock, bias: Tensor | None = None) -> Tensor:
        """As `mix`, of a shard: this rank attends for some of the heads, over all tokens of the row.

        bias: of the keys of the row, [B or 1, G, N].
        """
        shard, row = shard_of(clock), clock.whole
        ranks = range(len(shard.lengths))
        share = HeadShare(len(ranks), self.heads, self.kv_heads)
        readers, read = [share.queries(rank) for rank in ranks], [share.keys(rank) for rank in ranks]
        q = to_heads(shard, q, readers)
        k, v = to_heads(shard, torch.cat([k, v], -1), read).chunk(2, -1)
        local = share.local(shard.rank)
        life = row.once((self.alike, "row"), lambda: self.lifetimes(row))
        mine = list(read[shard.rank])
        if len(set(map(local.count, local))) > 1:  # `attend` wants every key head read by as many queries
            mine, k, v = [mine[head] for head in local], k[:, local], v[:, local]
        bias = None if bias is None else bias[:, mine]
        return to_tokens(shard, attend(q, k, v, of_heads(life, mine), key_bias=bias)[0], readers)

    def pattern(self, length: int) -> Lifetimes:
        """Lifetimes of the keys of one document of `length` tokens, int32 broadcast to [kv_heads, length]."""
        life = self.lifetimes(Clock.plain(length, torch.device("cpu")))
        return Lifetimes(life.birth[0], life.death[0])

    def pairs(self, length: int) -> int:
        """See `SoftmaxAttention.pairs`."""
        heads = {"heads": self.heads, "kv_heads": self.kv_heads}
        return living_pairs(self.pattern(length), None, batch=1, num_queries=length, num_keys=length, **heads)
