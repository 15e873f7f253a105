"""Routing Transformer: tokens are clustered by what they ask, and a token attends inside its cluster.

Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers" (2020, arXiv 2003.05997),
section 4.1, and google-research, routing_transformer. There every cluster takes its best tokens of the whole sequence,
which tells a token who comes after it: here that is `selection: paper`, for comparison. By default every token takes
its best cluster and meets the last tokens that took the same.

Shapes: B batch, T tokens, H heads, C clusters, D head width, N tokens that a cluster takes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.clock import Clock, read_clock
from attention.debug import check_finite
from attention.earlier import shard_of, side_by_side
from attention.lifetimes import FOREVER, Lifetimes, causal
from attention.mixer import (
    Context,
    Cost,
    Mixer,
    MixerOutput,
    init_fan_in,
    parameter_count,
    register,
    report,
    residual_output,
    setting,
    wide_linear,
)
from attention.online import OnlineMeans
from attention.ops.attend import attend
from attention.ops.lanes import attend_lanes, make_lanes, met_by
from attention.ops.rotary import apply_rotary
from attention.rings import ClusterRings
from attention.shard import Travel, bounds, gather_tokens
from attention.softmax import AttentionConfig
from attention.statistics import entropy, share

NORM_EPS = 1e-6


@dataclass
class RoutingConfig:
    """Settings of `routing`. Queries and keys are the same vectors, so every head is its own key head."""

    heads: int = setting(8, "heads", at_least=1)
    head_dim: int | None = setting(None, "width of a head; null = dim / heads", at_least=1)
    rotary: float = setting(10000.0, "base of the rotary positions; 0 = off", at_least=0)
    clusters: int = setting(16, "clusters of a head", at_least=1)
    window: int = setting(256, "members of its cluster that a query meets, its own token included", at_least=1)
    selection: Literal["strict", "paper"] = setting(
        "strict",
        "strict: a token takes its nearest cluster; paper: a cluster takes the `window` nearest tokens of the whole "
        "sequence, also later ones: no decoding, no packed documents",
    )
    decay: float = setting(0.999, "of the averages that are the centroids, per step", at_least=0, below=1)
    commitment: float = setting(1e-4, "weight of the loss that draws tokens to their centroids", at_least=0)

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Rules that hold between settings: (setting, message) for each one broken."""
        return self._common.problems(dim)

    def width(self, dim: int) -> int:
        """head_dim, filled in."""
        return self._common.width(dim)

    @property
    def _common(self) -> AttentionConfig:
        return AttentionConfig(self.heads, None, self.head_dim, self.rotary)


@register("routing")
class Routing(Mixer):
    """Attention inside the clusters of an online k-means over the vectors that are queries and keys at once.

    With c = LN(x W_q) (no gain, so |c|^2 = D) the cluster of a token is argmax_j <c, mu_j>, the lowest of equals;
    q = k = rotary(c), v = x W_v, y = concat(heads) W_o. Centroids mu [H, C, D] start at LN(N(0, 1)) and move after
    each optimizer step towards the tokens of their clusters. Gradients reach the choice only through c and the loss
    commitment * mean((c - mu)^2) over all numbers. The own logit, D^1/2, is the largest there can be.
    """

    Config = RoutingConfig
    sequence_parallel: str | None

    @classmethod
    def of(cls, dim: int, config: RoutingConfig) -> Mixer:
        """`TokenChoice` or `ClusterChoice`."""
        return TokenChoice(dim, config) if config.selection == "strict" else ClusterChoice(dim, config)

    def __init__(self, dim: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.heads, self.head_dim, self.dim = config.heads, config.width(dim), dim
        width = self.heads * self.head_dim
        self.shared = init_fan_in(nn.Linear(dim, width, bias=False))  # W_q
        self.value = init_fan_in(nn.Linear(dim, width, bias=False))
        self.output = init_fan_in(nn.Linear(width, dim, bias=False))
        residual_output(self.output.weight)
        drawn = torch.randn(self.heads, config.clusters, self.head_dim, dtype=torch.float32)
        self.centroids = OnlineMeans(_normed(drawn), config.decay)

    @abstractmethod
    def mix(
        self, shared: Tensor, v: Tensor, nearness: Tensor, cluster: Tensor, clock: Clock, state: ClusterRings | None
    ) -> Tensor:
        """Outputs of the heads [B, H, T, D].

        shared [B, H, T, D]: queries and keys; v [B, H, T, D]; nearness [B, H, T, C] of tokens to centroids; cluster
        [B, H, T], the nearest.
        """

    @abstractmethod
    def pairs(self, length: int) -> float:
        """Expected (query, key) pairs of a head, in one document of `length` tokens."""

    @abstractmethod
    def state_rows(self, length: int) -> int:
        """The most rows that the state of a head holds after `length` tokens."""

    def forward(self, x: Tensor, ctx: Context | None = None, state: ClusterRings | None = None) -> MixerOutput:
        """y [B, T, d] from x [B, T, d]; in training also the loss `commitment`. See `Mixer.forward`."""
        self.check_shard(ctx)
        clock = read_clock(x, ctx, None if state is None else state.stream)
        shared = _normed(self._heads(wide_linear(x, self.shared.weight)))
        nearness = self._nearness(shared)
        check_finite(ctx, "scores of tokens and clusters", nearness)
        cluster = nearness.argmax(-1)  # of equals torch gives the first
        v = self._heads(self.value(x))
        met = shared
        if self.config.rotary:
            met = apply_rotary(met, clock.rotary(self.head_dim, self.config.rotary))
        out = self.mix(met.to(v.dtype), v, nearness, cluster, clock, state)
        y = self.output(out.transpose(1, 2).flatten(2))
        report(ctx, lambda: self._statistics(shared, nearness, cluster, clock))
        if not self.in_training(ctx):
            return MixerOutput(y, {})
        commitment = self.config.commitment * self._distance(shared, cluster)
        return MixerOutput(self.centroids.learn(y, shared, cluster), {"commitment": commitment})

    @torch.no_grad()
    def _nearness(self, shared: Tensor) -> Tensor:
        with torch.autocast(shared.device.type, enabled=False):
            return shared @ self.centroids.means.to(shared.dtype).transpose(-1, -2)

    def _distance(self, shared: Tensor, cluster: Tensor) -> Tensor:
        """Mean square, over all numbers, of what parts a token from its centroid: 0 to 4."""
        head = torch.arange(self.heads, device=shared.device)[:, None]
        return F.mse_loss(shared, self.centroids.means[head, cluster].to(shared.dtype))

    def _statistics(self, shared: Tensor, nearness: Tensor, cluster: Tensor, clock: Clock) -> dict[str, Tensor]:
        """See docs/watching.md; arguments as of `mix`."""
        own = cluster[..., None] == torch.arange(self.config.clusters, device=cluster.device)
        load = own.float().mean((0, 2))  # [H, C]: shares of the tokens
        return {
            "dead_clusters": share(load == 0),
            "overloaded": load.max() * self.config.clusters,
            "load_entropy": entropy(load).mean(),
            "centroid_distance": self._distance(shared, cluster),
        }

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H D] -> [B, H, T, D]."""
        return x.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)

    def after_step(self, skipped: bool = False) -> None:
        """Move the centroids; `skipped`: forget what the step would have taught."""
        self.centroids.step(skipped)

    def init_state(self, batch: int, limit: int | None = None) -> ClusterRings:
        """Empty rings of the last window - 1 members of each cluster, for `batch` sequences."""
        device, config = self.value.weight.device, self.config
        return ClusterRings(batch, self.heads, config.clusters, config.window - 1, device, limit)

    def cost(self, length: int) -> Cost:
        """parameters 3dHD, flops 6TdHD + 2TCHD + 4D pairs; the rows of the state also hold an int32, their time.

        Pairs are an expectation, the state is a bound.
        """
        pairs = self.heads * self.pairs(length)
        width = self.heads * self.head_dim
        row = 2 * self.head_dim * self.value.weight.element_size() + 4
        return Cost(
            parameters=parameter_count(self),
            flops=length * width * (6 * self.dim + 2 * self.config.clusters) + 4 * self.head_dim * pairs,
            pairs=pairs,
            state_bytes=self.heads * self.state_rows(length) * row,
        )


class TokenChoice(Routing):
    """A token takes its nearest cluster, and meets the last `window` tokens of its document that took the same."""

    sequence_parallel = "cluster numbers of all tokens, and the last members of each cluster"

    def mix(
        self, shared: Tensor, v: Tensor, nearness: Tensor, cluster: Tensor, clock: Clock, state: ClusterRings | None
    ) -> Tensor:
        """See `Routing.mix`: attention in lanes, or, of a single new token, to its own ring."""
        if clock.shard is not None:
            return self._meet_lower_ranks(shared, v, cluster, clock)
        if state is None:
            lanes = make_lanes(cluster, clock.starts[:, None], window=self.config.window)
            return attend_lanes(shared, shared, v, lanes)[0]
        meet = self._meet_ring if shared.shape[2] == 1 else self._meet_rings
        out = meet(shared, v, cluster, clock, state)
        state.extend(shared, v, cluster, clock)
        return out

    def _meet_lower_ranks(self, shared: Tensor, v: Tensor, cluster: Tensor, clock: Clock) -> Tensor:
        """All ranks learn who is in which cluster; then those members travel that somebody meets."""
        shard, start = shard_of(clock), clock.whole.starts[:, None]
        clusters = gather_tokens(shard, cluster.to(torch.int32), 2).long()
        row = make_lanes(clusters, start, window=self.config.window)

        def needed(source: int, target: int) -> Tensor:
            return met_by(row, *bounds(shard, target))[..., slice(*bounds(shard, source))]

        travel = Travel.of(shard, shared, needed)
        k, v = travel.put_in_front(shard, shared, v)
        cluster = torch.cat([travel.take(clusters[..., : clock.now], 0), cluster], 2)
        start = side_by_side([travel.take(start[..., : clock.now], FOREVER), clock.starts[:, None]])
        lanes = make_lanes(cluster, start, queries=shared.shape[2], window=self.config.window)
        return attend_lanes(shared, k, v, lanes)[0]

    def _meet_ring(self, shared: Tensor, v: Tensor, cluster: Tensor, clock: Clock, state: ClusterRings) -> Tensor:
        k, life = shared, causal(1, shared.device)
        ring = state.one(cluster[..., 0], clock)
        if ring is not None:
            k, v = torch.cat([ring[0], k], 2), torch.cat([ring[1], v], 2)
            own = life.birth.expand(*v.shape[:2], 1)
            birth = torch.cat([ring[2].birth, own], 2)
            life = Lifetimes(birth, torch.full_like(birth, FOREVER))
        return attend(shared, k, v, life)[0]

    def _meet_rings(self, shared: Tensor, v: Tensor, cluster: Tensor, clock: Clock, state: ClusterRings) -> Tensor:
        k, start, time = shared, clock.starts[:, None], clock.time[:, None]
        start, time = (x.expand(cluster.shape) for x in (start, time))
        old = state.all()
        if old is not None:
            new = (k, v, cluster, time, start)
            k, v, cluster, time, start = (torch.cat(pair, 2) for pair in zip(old, new, strict=True))
        limit = None if state.limit is None else (time, state.limit)
        queries = shared.shape[2]
        lanes = make_lanes(cluster, start, queries=queries, window=self.config.window, limit=limit)
        return attend_lanes(shared, k, v, lanes)[0]

    def _statistics(self, shared: Tensor, nearness: Tensor, cluster: Tensor, clock: Clock) -> dict[str, Tensor]:
        """Those of all, and the share of tokens with more members of their cluster before them than they meet."""
        window = self.config.window
        member_of = ((clock.starts[:, None] << 31) + cluster).sort(-1).values
        binds = member_of[..., window:] == member_of[..., :-window]
        return {
            **super()._statistics(shared, nearness, cluster, clock),
            "window_binds": binds.sum() / cluster.numel(),
        }

    def pairs(self, length: int) -> float:
        """See `Routing.pairs`: where every token takes any cluster with the same chance, independently.

        The query at position i meets itself and min(X, w - 1) others, X ~ binomial(i, 1 / C). It is at least what
        clusters of equal size have, C f(T / C), and at most f(T), f(a) = wa - w(w - 1) / 2 or, for a < w, a(a + 1) / 2.
        """
        others, chance = self.config.window - 1, 1.0 / self.config.clusters
        if others == 0:
            return float(length)
        # From i to i + 1, E min(X, m) grows by P(X < m) / C, and P(X < m) falls by P(X = m - 1) / C.
        i = torch.arange(length, dtype=torch.float64, device="cpu")
        elsewhere = (i - (others - 1)).clamp(min=0)
        ways = torch.lgamma(i + 1) - math.lgamma(others) - torch.lgamma(elsewhere + 1)
        last = ways + (others - 1) * math.log(chance) + torch.special.xlogy(elsewhere, 1.0 - chance)
        last = last.exp().masked_fill(i < others - 1, 0.0)
        open_ring = 1.0 - chance * (last.cumsum(0) - last)
        met = chance * (open_ring.cumsum(0) - open_ring)
        return length + float(met.sum())

    def state_rows(self, length: int) -> int:
        """See `Routing.state_rows`."""
        return min(length, self.config.clusters * (self.config.window - 1))


class ClusterChoice(Routing):
    """A cluster takes the N = min(window, T) nearest tokens of the whole sequence, as in the paper: it sees ahead.

    A token's output is the mean over the clusters that took it, 0 if none did.
    """

    causality = "selects_ahead"
    sequence_parallel = None

    def mix(
        self, shared: Tensor, v: Tensor, nearness: Tensor, cluster: Tensor, clock: Clock, state: ClusterRings | None
    ) -> Tensor:
        """See `Routing.mix`. ValueError for rows of several documents."""
        if clock.end is not None and bool((clock.starts != clock.starts[:, :1]).any()):
            raise ValueError(
                "routing with selection paper chooses among all tokens of a row, so it takes no packed documents; "
                "give every document a row of its own, or set selection strict"
            )
        token, length = self._taken(nearness), v.shape[2]
        q, v = _take(shared, token), _take(v, token)
        out, _ = attend(q, q, v, causal(token.shape[3], v.device))
        return _put(out, token, length)

    def _taken(self, nearness: Tensor) -> Tensor:
        """The tokens that each cluster takes, in the order of time, [B, H, C, N]."""
        by_nearness = nearness.transpose(2, 3).argsort(dim=-1, descending=True, stable=True)  # [B, H, C, T]
        return by_nearness[..., : self.config.window].sort(-1).values

    def _statistics(self, shared: Tensor, nearness: Tensor, cluster: Tensor, clock: Clock) -> dict[str, Tensor]:
        """Those of all, and how many of the tokens no cluster took."""
        served = torch.zeros_like(cluster, dtype=torch.bool).scatter_(2, self._taken(nearness).flatten(2), True)
        return {**super()._statistics(shared, nearness, cluster, clock), "unserved": share(~served)}

    def pairs(self, length: int) -> float:
        """See `Routing.pairs`: exact."""
        taken = min(self.config.window, length)
        return self.config.clusters * taken * (taken + 1) / 2

    def state_rows(self, length: int) -> int:
        """None: what a cluster takes is not known before the last token."""
        return 0

    def init_state(self, batch: int, limit: int | None = None) -> ClusterRings:
        """Raises ValueError."""
        raise ValueError(
            "routing with selection paper has no state: which tokens a cluster takes is known after the last one; "
            "recompute the prefix, or set selection strict"
        )


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


# Cluster by cluster: inside one no token comes twice, so no sum depends on the order in which threads arrive.


def _take(x: Tensor, token: Tensor) -> Tensor:
    """Of x [B, H, T, D] the tokens [B, H, C, N] that each cluster took: [B, H C, N, D]."""
    wide = (*token.shape[:2], token.shape[3], x.shape[3])
    return torch.stack([x.gather(2, taken[..., None].expand(wide)) for taken in token.unbind(2)], 2).flatten(1, 2)


def _put(out: Tensor, token: Tensor, length: int) -> Tensor:
    """The reverse of `_take`: [B, H, T, D], for each token the mean of `out` over the clusters that took it."""
    of_cluster = out.unflatten(1, token.shape[1:3]).unbind(2)
    total = out.new_zeros(*token.shape[:2], length, out.shape[3])
    count = out.new_zeros(*token.shape[:2], length, 1)
    for mine, taken in zip(of_cluster, token.unbind(2), strict=True):
        index = taken[..., None]
        total = total.scatter_add(2, index.expand_as(mine), mine)
        count = count.scatter_add(2, index, torch.ones_like(mine[..., :1]))
    return total / count.clamp(min=1)
