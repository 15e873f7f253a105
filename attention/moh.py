"""Mixture-of-Head: some attention heads serve every token, of the others each token chooses a few.

Source: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention" (2024, arXiv 2410.11842), and its code,
SkyworkAI/MoH, which computes all heads and masks. Here the heads that a query did not choose cost it nothing. Every
key stays: a choice saves no memory.

Shapes: B batch, T tokens, H query heads, G key heads, S shared heads (the first), E routed ones, K of them active,
D head width, n queries in the longest list of a head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.cache import LivingKeys
from attention.clock import Clock, read_clock
from attention.debug import check_finite
from attention.earlier import earlier
from attention.lifetimes import FOREVER, Lifetimes
from attention.mixer import (
    Context,
    Cost,
    MixerOutput,
    floating,
    no_weight_decay,
    register,
    report,
    setting,
    wide_linear,
)
from attention.ops.attend import attend
from attention.ops.attend_plan import FEW_QUERIES
from attention.ops.project import gather_project, scatter_project
from attention.ops.rotary import apply_rotary
from attention.ops.select import listed
from attention.shard import mean_of_ranks
from attention.softmax import AttentionConfig, SoftmaxAttention
from attention.statistics import entropy, share

ROUTER_STD = 0.02


@dataclass
class MoHConfig(AttentionConfig):
    """Settings of `moh`."""

    shared_heads: int = setting(2, "how many of the heads, the first, serve every token", at_least=0)
    active_heads: int = setting(4, "how many of the other heads a token chooses", at_least=0)
    rescale: bool = setting(True, "gates of mean 1, as in the released code; false: those of the paper, below 1")
    balance: float = setting(0.01, "weight of the loss that spreads the choices over the heads", at_least=0)

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Those of all softmax mixers, as many heads as there are, and at least one for each token."""
        found = super().problems(dim)
        routed = self.heads - self.shared_heads
        if routed < 0:
            message = f"shared_heads {self.shared_heads} exceeds heads {self.heads}; nearest: {self.heads}"
            found.append(("shared_heads", message))
        elif self.active_heads > routed:
            message = f"active_heads {self.active_heads} exceeds heads - shared_heads = {routed}; nearest: {routed}"
            found.append(("active_heads", message))
        if self.shared_heads + self.active_heads == 0:
            message = "active_heads 0 must be >= 1 while shared_heads is 0: a token needs a head"
            found.append(("active_heads", message))
        return found


@register("moh")
class MoH(SoftmaxAttention):
    """Full causal attention, each head's output times a gate that is 0 for the routed heads not chosen.

    With p = softmax(x W_r), s = softmax(x W_s), a = softmax(x W_h) over E routed heads, S shared ones and the two
    kinds, the K largest p are chosen, the lowest head of equals. Gates: a_1 S s_i of shared heads and a_2 K p_i / sum
    of chosen p, both times 2 (the released code: of mean 1 where all are alike); without `rescale` a_1 s_i and a_2 p_i
    (equations 5 and 6). Where only one kind serves, its factor 2 a or a is 1. `router` holds the rows of W_r, W_s and
    W_h of the kinds that serve. Loss: balance * E sum_i P_i f_i, P_i the mean p_i and f_i the share of tokens that
    chose i; it is balance * K where all are chosen alike. (Equation 7 has no factor E.)
    """

    Config = MoHConfig

    def __init__(self, dim: int, config: MoHConfig) -> None:
        super().__init__(dim, config)
        self.shared_heads, self.active = config.shared_heads, config.active_heads
        self.routed = self.heads - self.shared_heads
        both = 2 if self.active and self.shared_heads else 0
        self.logits = [self.routed if self.active else 0, self.shared_heads, both]
        self.router = nn.Linear(dim, sum(self.logits), bias=False)
        nn.init.normal_(self.router.weight, std=ROUTER_STD)
        no_weight_decay(self.router.weight)

    def death(self, clock: Clock) -> Tensor:
        """Never."""
        return torch.full((1, 1, clock.time.shape[1]), FOREVER, device=clock.time.device)

    def pairs(self, length: int) -> int:
        """Those of dense attention, for the heads that serve a token."""
        return (self.shared_heads + self.active) * length * (length + 1) // 2

    def forward(self, x: Tensor, ctx: Context | None = None, state: LivingKeys | None = None) -> MixerOutput:
        """y [B, T, d] from x [B, T, d]; in training also the loss `balance`. See `Mixer.forward`."""
        clock = read_clock(x, ctx, None if state is None else state.stream)
        routes = self._route(x)
        check_finite(ctx, "gates of the router", routes.gates)
        report(ctx, lambda: self._statistics(routes))
        w_q, w_kv = self.qkv.weight.split([self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim])
        k, v = map(self._heads, F.linear(x, w_kv).chunk(2, -1))
        k = self.turned(k, clock)
        life = clock.once(self.alike, lambda: self.lifetimes(clock))
        past = earlier(state, clock, self.alike, self.lifetimes)
        if past is not None:
            k, v, life = past.extend(k, v, life, clock)
            past.advance(clock)
        keys = _Keys(k, v, Lifetimes(life.birth[:, :1], life.death[:, :1]), clock)  # all heads are alike
        y = self._mix(x, w_q, routes, keys, few=state is not None and x.shape[1] <= FEW_QUERIES)
        if not (self.active and self.in_training(ctx)):
            return MixerOutput(y, {})
        chosen = routes.serves[:, self.shared_heads :].to(routes.gates.dtype).mean((0, 2))
        share = chosen if clock.shard is None else mean_of_ranks(clock.shard, chosen)
        spread = self.routed * (routes.probabilities.mean((0, 1)) * share).sum()
        return MixerOutput(y, {"balance": self.config.balance * spread})

    def _route(self, x: Tensor) -> _Routes:
        p, s, kinds = (z.softmax(-1) for z in wide_linear(x, self.router.weight).split(self.logits, -1))
        chosen = p.argsort(dim=-1, descending=True, stable=True)[..., : self.active]
        serves = torch.zeros(*x.shape[:2], self.routed, dtype=torch.bool, device=x.device).scatter_(-1, chosen, True)
        routed = p.masked_fill(~serves, 0.0) if self.active else s.new_zeros(serves.shape)
        a = kinds
        if self.config.rescale:
            s, a = self.shared_heads * s, 2 * a
            if self.active:
                routed = self.active * (routed / routed.sum(-1, keepdim=True))
        if a.shape[-1]:
            s, routed = a[..., :1] * s, a[..., 1:] * routed
        always = torch.ones_like(s, dtype=torch.bool)
        gates, serves = (torch.cat(t, -1).transpose(1, 2) for t in ((s, routed), (always, serves)))
        return _Routes(gates, serves, p, kinds)

    def _statistics(self, routes: _Routes) -> dict[str, Tensor]:
        """See docs/watching.md; of the routed heads, if tokens choose among them, and of the choice between kinds."""
        found = {}
        if self.active:
            load = routes.serves[:, self.shared_heads :].float().mean((0, 2))  # [E]: shares of the tokens; sum K
            found["load_entropy"] = entropy(load / self.active)
            found["least_loaded"], found["most_loaded"] = (load * self.routed / self.active).aminmax()
            found["dead_heads"] = share(load == 0)
            found["router_entropy"] = entropy(routes.probabilities).mean()
        if self.active and self.shared_heads:
            found["shared_branch"] = routes.kinds[..., 0].mean()
        return found

    def _mix(self, x: Tensor, w_q: Tensor, routes: _Routes, keys: _Keys, few: bool) -> Tensor:
        """y [B, T, d]: the first heads for all queries, the others for the queries that chose them; a head more costs
        few queries less than lists do. A key head is in one of the two parts, with all its query heads."""
        group = self.heads // self.kv_heads
        serving = self.heads if self.active else self.shared_heads
        everyone = self.shared_heads // group * group
        if few or self.active == self.routed:
            everyone = self.heads
        if everyone == 0:
            return self._chosen(x, w_q, routes, keys, 0)
        y = self._all(x, w_q, routes, keys, everyone)
        return y if everyone >= serving else y + self._chosen(x, w_q, routes, keys, everyone)

    def _all(self, x: Tensor, w_q: Tensor, routes: _Routes, keys: _Keys, until: int) -> Tensor:
        """What heads 0..until-1 add to y, computed for all queries."""
        width, groups = until * self.head_dim, until * self.kv_heads // self.heads
        q = self.turned(self._heads(F.linear(x, w_q[:width])), keys.clock)
        out, _ = attend(q, keys.k[:, :groups], keys.v[:, :groups], keys.life, time=keys.clock.query_time)
        out = out * routes.gates[:, :until, :, None].to(out.dtype)
        return F.linear(out.transpose(1, 2).flatten(2), self.output.weight[:, :width])

    def _chosen(self, x: Tensor, w_q: Tensor, routes: _Routes, keys: _Keys, first: int) -> Tensor:
        """What heads first..H-1 add to y, each computed for the queries that it serves."""
        width, groups, dtype = first * self.head_dim, first * self.kv_heads // self.heads, keys.k.dtype
        index = listed(routes.serves[:, first:])
        by_head = (-1, self.head_dim)
        into = w_q[width:].unflatten(0, by_head).transpose(1, 2).to(dtype)
        out_of = self.output.weight[:, width:].T.unflatten(0, by_head).to(dtype)

        token = index.clamp(min=0)
        q = gather_project(x.to(dtype), index, into)
        if self.config.rotary:
            table = keys.clock.rotary(self.head_dim, self.config.rotary)
            cos, sin = (t.to(floating(q)).take_along_dim(token[..., None], 2) for t in table)
            q = apply_rotary(q, (cos, sin))
        time = torch.where(index < 0, FOREVER, keys.clock.time[0, token]).to(torch.int32)
        out, _ = attend(q, keys.k[:, groups:], keys.v[:, groups:], keys.life, time=time)
        gates = routes.gates[:, first:].take_along_dim(token, 2)
        return scatter_project(out, index, gates, out_of, x.shape[1])

    def cost(self, length: int) -> Cost:
        """As dense with its router; queries, outputs and pairs only of the S + K heads that serve a token."""
        cost = super().cost(length)
        idle = 2 * self.dim * self.head_dim * (self.heads - self.shared_heads - self.active)
        return dataclasses.replace(cost, flops=cost.flops + 2 * length * (self.router.weight.numel() - idle))


class _Routes(NamedTuple):
    """gates [B, H, T], 0 where a head does not serve a token; serves [B, H, T] bool; probabilities p [B, T, E] of the
    routed heads, kinds a [B, T, 2] (or 0: there is one kind only)."""

    gates: Tensor
    serves: Tensor
    probabilities: Tensor
    kinds: Tensor


class _Keys(NamedTuple):
    """k, v [B, G, N, D] that the new queries may meet, their lifetimes [B or 1, 1, N], and the queries' clock."""

    k: Tensor
    v: Tensor
    life: Lifetimes
    clock: Clock
