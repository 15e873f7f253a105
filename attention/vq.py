"""Transformer-VQ: keys are quantised to a few codes, so that all old tokens of one code are one key.

Source: Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization" (2023, arXiv 2309.16354). Tokens
whose keys have the same code have the same logit. So a query meets the tokens of its own block and of the block before
as themselves, and all earlier ones code by code: a key C_s, the mean of their values, and log(number) added to the
logit. That is exact attention over quantised keys, in linear time, with a state of constant size.

The paper is a gated unit with one head (`gated: true`, heads 1); without gate it is ordinary attention with a codebook
for each key head. Here relative positions reach back L tokens, and codes begin as wide as keys are.

Shapes: B batch, T new tokens, R of them and the earlier ones kept, N blocks of L tokens, S codes, H query heads, G key
heads, D and Dv widths of keys and values, 2F position features.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.clock import Clock, read_clock
from attention.earlier import EarlierTokens
from attention.lifetimes import FOREVER, Lifetimes, living_pairs
from attention.mixer import (
    Context,
    Cost,
    Mixer,
    MixerOutput,
    floating,
    init_fan_in,
    no_weight_decay,
    parameter_count,
    register,
    report,
    residual_output,
    setting,
    wide_linear,
)
from attention.online import OnlineMeans
from attention.ops.attend import KeySet, attend_union
from attention.ops.codes import code_prefix, code_totals, look_up, straight_through, vq_assign
from attention.ops.norm import rms_norm
from attention.ops.rotary import apply_rotary
from attention.shard import tied, to_higher
from attention.softmax import AttentionConfig
from attention.spans import Blocks, with_earlier
from attention.tail import SpanState

NORM_EPS = 1e-6
BASE = 10000.0  # of the wavelengths of position features
Folded: TypeAlias = list[tuple[Tensor, Tensor]]  # (count, mean) of all codes, once or twice: see `VQ.beginnings`
DEAD = 0.1  # of an equal share of the keys: a code with less moves to where the error is largest


@dataclass
class VQConfig:
    """Settings of `vq`."""

    heads: int = setting(8, "query heads", at_least=1)
    kv_heads: int | None = setting(
        None, "key and value heads, shared by groups of query heads; null = heads", at_least=1
    )
    head_dim: int | None = setting(None, "width of a query and a key; null = dim / heads", at_least=1)
    value_dim: int | None = setting(None, "width of a value; null = head_dim, or, if gated, 2 dim / heads", at_least=1)
    codes: int = setting(512, "codes of a key head", at_least=1)
    block: int = setting(
        512, "tokens of a block: a query meets those of its own and the one before as themselves", at_least=1
    )
    positions: Literal["xl", "none"] = setting(
        "xl", "xl: logits depend on the distance, up to one block; none: on order not at all"
    )
    position_features: int | None = setting(
        None, "sines and cosines of the distance, an even number; null = head_dim (xl only)", at_least=2
    )
    decay: float = setting(0.99, "of the averages that are the codes, per step", at_least=0, below=1)
    commitment: float = setting(1e-4, "weight of the loss that draws keys to their codes", at_least=0)
    gated: bool = setting(False, "the paper's unit: silu of the values, and outputs times silu(x W)")

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Rules that hold between settings: (setting, message) for each one broken."""
        found = self._common.problems(dim)
        if self.value_dim is None and self.gated and 2 * dim % self.heads:
            found.append(("value_dim", f"heads {self.heads} does not divide 2 dim = {2 * dim}; set value_dim"))
        if not any(name == "heads" for name, _ in found) and self.features(dim) % 2:
            source = "" if self.position_features else ", which is head_dim; set it, or positions none"
            message = f"position_features must be even, got {self.features(dim)}{source}"
            found.append(("position_features", message))
        return found

    def width(self, dim: int) -> int:
        """head_dim, filled in."""
        return self._common.width(dim)

    def value_width(self, dim: int) -> int:
        """value_dim, filled in."""
        return self.value_dim or (2 * dim // self.heads if self.gated else self.width(dim))

    def features(self, dim: int) -> int:
        """position_features, filled in; 0 without positions."""
        return (self.position_features or self.width(dim)) if self.positions == "xl" else 0

    @property
    def _common(self) -> AttentionConfig:
        return AttentionConfig(self.heads, self.kv_heads, self.head_dim, rotary=0.0)


@register("vq")
class VQ(Mixer):
    """Softmax attention over quantised keys.

    q = rms(x W_q) D^-1/4, k = rms(x W_k) D^-1/4, v = x W_v. A key has the code z = argmin_s |k - C_s|^2, the lowest of
    equals, and is met as khat = C_z, with the gradient of k (straight through). Logit of query i and key j:

        (q_i + b_u) khat_j + [i - j <= L] (q_i + b_w) W_r rho(j - i),   rho(n) = (cos(w n), sin(w n)), F frequencies w

    Two blocks back, khat is C_z without gradient: there k learns nothing, q and v do. So the outputs do not depend on
    how tokens fall into blocks, gradients do. y = concat(heads) W_o; gated: v = silu(x W_v), y = (concat(heads) silu(x
    W_g)) W_o. Matrices start at N(0, 1 / fan_in), W_r [D, 2F] of each head at N(0, 1 / 2F), b_u and b_w at 0.

    The codebook [G, S, D] starts at N(0, D^-1/2) and moves after each optimizer step towards the keys of each code;
    codes that hardly anyone has move to where the error is largest (`OnlineMeans`). The loss commitment * mean over
    tokens of sum over key heads of |k - C_z|^2 draws the keys to it.
    """

    Config = VQConfig
    sequence_parallel = "the last one or two blocks, and count and mean value of each code"

    def __init__(self, dim: int, config: VQConfig) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim, self.value_dim = config.width(dim), config.value_width(dim)
        self.features = config.features(dim)
        self.query = init_fan_in(nn.Linear(dim, self.heads * self.head_dim, bias=False))
        self.key = init_fan_in(nn.Linear(dim, self.kv_heads * self.head_dim, bias=False))
        self.value = init_fan_in(nn.Linear(dim, self.kv_heads * self.value_dim, bias=False))
        self.gate = init_fan_in(nn.Linear(dim, self.heads * self.value_dim, bias=False)) if config.gated else None
        self.output = init_fan_in(nn.Linear(self.heads * self.value_dim, dim, bias=False))
        residual_output(self.output.weight)
        self.content_bias = nn.Parameter(torch.zeros(self.heads, 1, self.head_dim))  # b_u
        no_weight_decay(self.content_bias)
        if self.features:
            self.position_bias = nn.Parameter(torch.zeros(self.heads, 1, self.head_dim))  # b_w
            no_weight_decay(self.position_bias)
            drawn = torch.randn(self.heads, self.head_dim, self.features) * self.features**-0.5
            self.position_weight = nn.Parameter(drawn)  # W_r
        drawn = torch.randn(self.kv_heads, config.codes, self.head_dim, dtype=torch.float32)
        self.codebook = OnlineMeans(drawn * self.head_dim**-0.25, config.decay, dead=DEAD)
        self.alike = (type(self), repr(config))  # layers that share this share lifetimes

    def forward(self, x: Tensor, ctx: Context | None = None, state: CodeState | None = None) -> MixerOutput:
        """y [B, T, d] from x [B, T, d]; in training also the loss `commitment`. See `Mixer.forward`."""
        clock = read_clock(x, ctx, None if state is None else state.stream)
        # Products are those of a scale D^-1/2.
        size = self.head_dim**-0.25
        q = rms_norm(self._heads(self.query(x), self.head_dim), NORM_EPS, size)
        k = rms_norm(self._heads(wide_linear(x, self.key.weight), self.head_dim), NORM_EPS, size)
        v = self._heads(self.value(x), self.value_dim)
        if self.gate is not None:
            v = F.silu(v)
        code = vq_assign(k, self.codebook.means)
        quantised = look_up(self.codebook.means, code).to(k.dtype)
        out = self.mix(q, straight_through(k, quantised).to(v.dtype), code, v, clock, state)
        out = out.transpose(1, 2).flatten(2)
        if self.gate is not None:
            out = out * F.silu(self.gate(x))
        y = self.output(out)
        report(ctx, lambda: self.statistics(k, quantised, code))
        if not self.in_training(ctx):
            return MixerOutput(y, {})
        distance = F.mse_loss(k, quantised) * (self.kv_heads * self.head_dim)
        return MixerOutput(self.codebook.learn(y, k, code), {"commitment": self.config.commitment * distance})

    def mix(self, q: Tensor, k: Tensor, code: Tensor, v: Tensor, clock: Clock, state: CodeState | None) -> Tensor:
        """Outputs of the heads [B, H, T, Dv], from q [B, H, T, D], the quantised k [B, G, T, D] with its code [B, G,
        T], and v [B, G, T, Dv] of the new tokens. With a state: meets what it holds, and moves it on."""
        new = {"code": code[..., None], "v": v}
        rows, limit = new, None
        carry: Folded = []
        if state is not None:
            rows, limit = state.tail.before(new, state.tail.size), state.limit
            carry = state.folded
            kept = rows["code"][:, :, : state.tail.size, 0]
            k = torch.cat([look_up(self.codebook.means, kept).to(k.dtype), k], 2)
        elif clock.shard is not None:
            tail = EarlierTokens(clock, self.alike, lambda there: int(self.kept(there).max()))
            carry = [self.before_shard(code, v, clock)]
            rows = tail.before({**new, "k": k})
            k, rows["v"] = rows["k"], tied(rows["v"], carry[0][1])
        recent = with_earlier(clock, k.shape[2] - code.shape[2])
        carried = bool(carry)
        plan = clock.once((self.alike, carried, limit), lambda: self.plan(recent, limit, carried))
        content = (q + self.content_bias).to(v.dtype)
        sets, folded = [], None
        if plan.near is not None:
            sets.append(KeySet(content, k, rows["v"], plan.near, columns=self.features_of(q, v.dtype, clock, recent)))
        if plan.far is not None:
            sets.append(KeySet(content, k, rows["v"], plan.far))
        if plan.old is not None:
            code_BGNL, v_BGNLD = (plan.blocks.tokens(rows[name]) for name in ("code", "v"))
            told = code_BGNL.squeeze(-1), v_BGNLD, self.config.codes
            folded = [
                code_prefix(*told, fresh=fresh, whole=plan.blocks.whole, carry=before)
                for fresh, before in zip(plan.fresh, carry or itertools.repeat(None))
            ]
            count, mean = plan.elder(folded)
            entries = self.codebook.means.to(v.dtype)[None, :, None].expand(*count.shape, -1).flatten(2, 3)
            values, bias = mean.to(v.dtype).flatten(2, 3), count.log().flatten(2)
            sets.append(KeySet(content, entries, values, plan.old, bias))
        if state is not None:
            state.go_on(new, folded, clock, self.config.block)
        return attend_union(sets, time=clock.query_time, scale=1.0)[0]

    def kept(self, clock: Clock) -> Tensor:
        """How many tokens before the first one of the clock are met as themselves by it or a later one, int64 [B or 1]:
        those of its block and of the one before."""
        position, length = clock.position[:, 0], self.config.block
        return position % length + torch.where(position < length, 0, length)

    def before_shard(self, code: Tensor, v: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """Count and mean [B, G, S, ..] of the codes of a document before the tokens that its first queries meet as
        themselves; from code [B, G, T] and v [B, G, T, Dv] of each rank's tokens."""
        shard = clock.shard
        assert shard is not None
        counts, means = [], []
        for rank in range(shard.rank + 1, len(shard.lengths)) or [shard.rank]:
            there = clock.of_rank(rank)
            first, stop = there.starts[:, :1], there.time[:, :1] - self.kept(there)[:, None]
            folded = (first <= clock.time) & (clock.time < stop)
            count, mean = code_totals(code.masked_fill(~folded[:, None], self.config.codes), v, self.config.codes)
            counts.append(count)
            means.append(mean)
        came_counts, came_means = to_higher(shard, counts), to_higher(shard, means)
        count = came_counts.sum(0)
        mean = (came_means * (came_counts / count.clamp(min=1))[..., None]).sum(0)
        return count, mean

    def features_of(self, q: Tensor, dtype: torch.dtype, clock: Clock, recent: Clock) -> tuple[Tensor, Tensor]:
        """Columns of queries [B, H, T, 2F] and of keys [B or 1, 1, R, 2F], in `dtype`, whose products are the relative
        term.

        a . rho(j - i), with rho at j turned back by i, is a turned by i, times rho(j).
        """
        of_distance = (q + self.position_bias).to(dtype) @ self.position_weight
        turned = apply_rotary(of_distance, clock.rotary(self.features, BASE))
        return turned.to(dtype), torch.cat(recent.rotary(self.features, BASE), -1).to(dtype)

    def plan(self, recent: Clock, limit: int | None, carried: bool) -> Plan:
        """Who lives when among these tokens and the codes that their blocks read; `carried`: they follow on a state."""
        length, time = self.config.block, recent.time
        end = (time + 2 * length - recent.position % length).masked_fill(recent.position < 0, 0)
        if limit is not None:
            end = torch.minimum(end, time + limit)
        middle = time + (length + 1 if self.features else 0)
        first, middle, last = (recent.until(t[:, None]) for t in (time, torch.minimum(middle, end), end))
        tokens = time.shape[1]
        blocks = Blocks.of(recent, length)
        # What block b and those before it hold is read by block b + 2, and stands in the place of block b + 1.
        read = blocks.whole & (blocks.last >= 2 * length - 1)
        death = torch.minimum(blocks.born + length, blocks.end).clamp(max=FOREVER).where(read, blocks.born)
        birth, death = (
            t.to(torch.int32).repeat_interleave(self.config.codes, 1)[:, None] for t in (blocks.born, death)
        )
        return Plan(
            near=Lifetimes(first, middle) if self.features else None,
            far=Lifetimes(middle, last) if not self.features or tokens > length + 1 else None,
            old=Lifetimes(birth, death) if tokens > 2 * length or (carried and tokens >= length) else None,
            blocks=blocks,
            **self.beginnings(blocks, limit),
        )

    def beginnings(self, blocks: Blocks, limit: int | None) -> dict[str, Any]:
        """`fresh` and `second` of the `Plan`.

        With a limit of M blocks there are two sums, begun anew with the blocks 0, 2M, 4M, .. and M, 3M, .. of a
        document. The one begun earlier is read: it holds all blocks of the last M, and none that is 2M old.
        """
        fresh, number = blocks.last == self.config.block - 1, blocks.last // self.config.block
        if limit is None:
            return {"fresh": (fresh,), "second": None}
        span = -(-limit // self.config.block)
        place = number % (2 * span)
        return {"fresh": (fresh | (place == 0), fresh | (place == span)), "second": place < span}

    def statistics(self, k: Tensor, quantised: Tensor, code: Tensor) -> dict[str, Tensor]:
        """Of these tokens: the share of the codes that are used, and of how many equally likely ones they would be
        (perplexity), means over the key heads; |k - khat|^2 / |k|^2. And codes with fewer than one token per step."""
        places = self.kv_heads * self.config.codes
        own = torch.arange(0, places, self.config.codes, device=code.device)[:, None]
        used = (code + own).flatten().bincount(minlength=places).view(self.kv_heads, -1).to(k.dtype)
        share = used / used.sum(-1, keepdim=True)
        return {
            "used_codes": (used > 0).to(share.dtype).mean(),
            "code_perplexity": torch.special.entr(share).sum(-1).exp().mean(),
            "quantization_error": (k - quantised).square().sum() / k.square().sum(),
            "dead_codes": (self.codebook.count < 1).sum(),
        }

    def _heads(self, x: Tensor, width: int) -> Tensor:
        """[B, T, heads * width] -> [B, heads, T, width]."""
        return x.unflatten(2, (-1, width)).transpose(1, 2)

    def after_step(self, skipped: bool = False) -> None:
        """Move the codebook; `skipped`: forget what the step would have taught."""
        self.codebook.step(skipped)

    def init_state(self, batch: int, limit: int | None = None) -> CodeState:
        """An empty state for `batch` sequences. No token is met as itself after `limit` steps; with its code it goes
        after one to two times as many."""
        weight = self.value.weight
        count = weight.new_zeros(batch, self.kv_heads, self.config.codes, dtype=floating(weight))
        return CodeState(count, count.new_zeros(*count.shape, self.value_dim), limit)

    def pattern(self, length: int) -> Lifetimes:
        """Lifetimes of the keys of one document, int32 [1, keys], all key heads being alike: tokens with features,
        tokens without, codes."""
        plan = self._plan(length)
        lives = [life for life in (plan.near, plan.far, plan.old) if life is not None]
        return Lifetimes(
            torch.cat([life.birth[0] for life in lives], 1), torch.cat([life.death[0] for life in lives], 1)
        )

    def cost(self, length: int) -> Cost:
        """flops: 2 per token and number of each matrix, W_r included; 2GSD per token to find codes, 2GSDv to sum values
        by code; of each pair 2(D + Dv), and 4F where positions count. Pairs, over H heads: those with tokens of the own
        block and the one before, and S for each token behind the first two blocks.

        State: of the tokens of the last one or two blocks the code (4 bytes) and v, and S (count, mean) in float32.
        """
        plan, config = self._plan(length), self.config
        near, far, old = (0 if life is None else self._met(life, length) for life in (plan.near, plan.far, plan.old))
        D, Dv, S, G = self.head_dim, self.value_dim, config.codes, self.kv_heads
        summed = max(0, length // config.block - 1) * config.block if plan.old is not None else 0
        matrices = [m.weight for m in (self.query, self.key, self.value, self.gate, self.output) if m is not None]
        parameters = sum(m.numel() for m in matrices) + self.heads * D * self.features
        flops = 2 * length * parameters + 2 * length * G * S * D + 2 * summed * G * S * Dv
        flops += 2 * (D + self.features + Dv) * near + 2 * (D + Dv) * (far + old)
        itemsize = self.value.weight.element_size()
        kept = length - max(0, length // config.block - 1) * config.block
        state = kept * G * (Dv * itemsize + 4) + G * S * (1 + Dv) * max(4, itemsize)
        return Cost(parameter_count(self), flops, near + far + old, state)

    def _met(self, life: Lifetimes, length: int) -> int:
        keys = life.birth.shape[-1]
        heads = {"heads": self.heads, "kv_heads": self.kv_heads}
        return living_pairs(life, None, batch=1, num_queries=length, num_keys=keys, **heads)

    def _plan(self, length: int) -> Plan:
        return self.plan(Clock.plain(length, torch.device("cpu")), None, carried=False)


@dataclass(frozen=True, eq=False)
class Plan:
    """Lifetimes int32 [B or 1, 1, ...] of R tokens with their features, of the same without, and of the codes that each
    block N stands for; None where nobody could be alive.

    blocks   of these tokens
    fresh    bool [B or 1, N], for each sum over earlier blocks: it begins anew with this block
    second   bool [B or 1, N]: of two sums this block reads the second; None: there is one
    """

    near: Lifetimes | None
    far: Lifetimes | None
    old: Lifetimes | None
    blocks: Blocks
    fresh: tuple[Tensor, ...]
    second: Tensor | None

    def elder(self, folded: Folded) -> tuple[Tensor, Tensor]:
        """Of each block the sum that it reads: count [B, G, N, S] and mean [B, G, N, S, Dv]."""
        if self.second is None:
            return folded[0]
        of_one, of_two = folded
        second = self.second[:, None, :, None]
        return torch.where(second, of_two[0], of_one[0]), torch.where(second[..., None], of_two[1], of_one[1])


class CodeState(SpanState):
    """The tokens of the last one or two blocks, as (code, v), and what the blocks before them hold of each code.

    folded: count [B, G, S] and mean [B, G, S, Dv]; with a limit two of each, which begin anew in turn
    """

    def __init__(self, count: Tensor, mean: Tensor, limit: int | None = None) -> None:
        super().__init__(len(count), count.device, limit)
        self.folded: Folded = [(count, mean)] * (1 if limit is None else 2)

    def go_on(self, new: dict[str, Tensor], prefixes: Folded | None, clock: Clock, length: int) -> None:
        """The new tokens are done. Of the complete blocks of `length` tokens keep the last one, and fold the others:
        they are the prefix of that one, count [B, G, N, S] and mean. None: no block is complete."""
        tokens, position = self.tail.size + clock.time.shape[1], clock.position[:, -1] + 1
        if prefixes is not None:
            # Where none is complete any will do: the next complete block is the first of its document.
            last = (tokens - length - position % length).clamp(min=0) // length
            row = torch.arange(len(self.kept_B), device=last.device)
            self.folded = [
                (count.detach()[row, :, last].clone(), mean.detach()[row, :, last].clone()) for count, mean in prefixes
            ]
        self.keep(new, position % length + torch.where(position < length, 0, length), clock)

    @property
    def bytes(self) -> int:
        """Bytes of what is kept, over all sequences."""
        return super().bytes + sum(x.nbytes for one in self.folded for x in one)

    @property
    def capacity(self) -> int:
        """Bytes allocated, padding included."""
        return super().capacity + sum(x.nbytes for one in self.folded for x in one)
