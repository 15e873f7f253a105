"""The threshold of SPARSEK: the projection of all scores so far onto {0 <= c <= 1, sum of c = keep}.

Source: Lou et al., "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers" (2024,
arXiv 2406.16747). The projection of scores u is c = clip(u - tau, 0, 1) with one threshold tau, which never falls as
scores are added: so who has left (c = 0) stays away, and has a lifetime.

Legend of shapes: B batch, G key heads, N tokens; R = B G lists; Q queries of a chunk, M candidates that they meet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.lifetimes import FOREVER
from attention.ops.select import streaming_top_k

CHUNK = 64  # queries that share one sorted list of candidates


def sparsek_threshold(
    u: Tensor, keep: int, candidates: int, *, delay: int = 0, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Thresholds at the time of each token, and when each token's c becomes 0 for good.

    u       [B, G, N], float32 or float64, finite, of tokens in the order of time
    keep    what the c of a time sum to, if there are more candidates
    candidates   of the scores in question only so many take part, the best in the order of `streaming_top_k`; at least
            `keep`. One that leaves them may leave with c > 0
    delay   in question at token t are tokens up to t - delay
    start   int64, ascending, broadcastable to [B, G, N]: when the token's document began; default: all of one document.
            Padding stands in front and has -1

    Returns tau [B, G, N] in u's type, -inf while there are no more than `keep` candidates, and death, int64 [B, G, N]:
    the first token t at or behind j + delay at which c_tj = clip(u_j - tau_t, 0, 1) is 0 or j no candidate, or the end
    of its document; FOREVER if the last token comes before. Where the best `keep` lie 1 or more above all others any
    tau between gives the same c: it is the middle, with gradient 0. Differentiable in u through tau. To go on later it
    is enough to give those who live, and the last `delay` tokens, in front of the new ones: the c are the same, tau too
    but for that middle. Work and memory N (candidates + CHUNK) and N log N, R CHUNK (candidates + CHUNK).
    ValueError for a `keep` below 1, fewer `candidates` than that, or a negative `delay`.
    """
    if keep < 1 or candidates < keep or delay < 0:
        raise ValueError(f"expected 1 <= keep <= candidates and delay >= 0, got {keep}, {candidates} and {delay}")
    number = u.shape[-1]
    document = torch.zeros_like(u, dtype=torch.int64) if start is None else start.expand(u.shape).contiguous()
    end = torch.searchsorted(document, document, right=True)
    left = torch.minimum(streaming_top_k(u, candidates, start=None if start is None else document), end)
    tau, death = _Threshold.apply(u, left, end, keep, candidates)
    if delay:
        tau = F.pad(tau, (delay, 0), value=-torch.inf)[..., :number]
        before = F.pad(document, (delay, 0), value=-2)[..., :number]
        tau = tau.masked_fill(before != document, -torch.inf)
        death = torch.minimum(death + delay, end)
    return tau, death.masked_fill(death >= number, FOREVER)


class _Threshold(torch.autograd.Function):
    """Without delay: tau [B, G, N], and the token at which each one dies, at most the end of its document."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, left: Tensor, end: Tensor, keep: int, candidates: int) -> tuple[Tensor, Tensor]:
        tau = _thresholds(u.flatten(0, 1), left.flatten(0, 1), keep, candidates).view(u.shape)
        token = torch.arange(u.shape[-1], device=u.device).expand(u.shape)
        death = _first(tau, u, token, left, reached=True)
        ctx.save_for_backward(u, tau, death)
        ctx.mark_non_differentiable(death)
        return tau, death

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """tau moves with the mean of those with 0 < c < 1: a token is one of them from the time at which tau exceeds
        u - 1 until its death, so its gradient is a sum over an interval."""
        u, tau, death = ctx.saved_tensors
        token = torch.arange(u.shape[-1], device=u.device).expand(u.shape)
        begin = _first(tau, u - 1, token, death, reached=False)
        steps = torch.zeros(*u.shape[:-1], u.shape[-1] + 1, dtype=torch.int64, device=u.device)
        ones = torch.ones_like(begin)
        inside = steps.scatter_add(-1, begin, ones).scatter_add(-1, death, -ones).cumsum(-1)[..., :-1]
        share = torch.where(inside > 0, grad.double() / inside.clamp(min=1), 0.0)
        total = F.pad(share.cumsum(-1), (1, 0))
        return (total.gather(-1, death) - total.gather(-1, begin)).to(u.dtype), None, None, None, None


def _first(tau: Tensor, bound: Tensor, low: Tensor, high: Tensor, *, reached: bool) -> Tensor:
    """The first token from `low` on at which tau >= bound (reached) or tau > bound, `high` if none before it."""
    high = torch.maximum(low, high)
    for _ in range(tau.shape[-1].bit_length()):
        middle = (low + high) >> 1
        there = tau.gather(-1, middle.clamp(max=tau.shape[-1] - 1))
        found = (there >= bound if reached else there > bound) | (middle >= high)
        low, high = torch.where(found, low, middle + 1), torch.where(found, middle, high)
    return high


def _thresholds(u: Tensor, left: Tensor, keep: int, candidates: int) -> Tensor:
    """tau [R, N] of u [R, N], where token j is a candidate from j until `left` [R, N]."""
    tau = torch.empty_like(u)
    value = u.double()
    rows, number = u.shape
    token = torch.arange(number, device=u.device).expand(rows, -1)
    held = [value[:, :0], token[:, :0], left[:, :0]]
    for begin in range(0, number, CHUNK):
        here = slice(begin, min(begin + CHUNK, number))
        held = [torch.cat([old, new[:, here]], 1) for old, new in zip(held, (value, token, left))]
        tau[:, here] = _solve(held[0], held[1], held[2], token[:, here], keep).to(tau.dtype)
        alive = held[2] > here.stop
        order = (~alive).to(torch.int8).argsort(dim=1, stable=True)[:, :candidates]
        held = [t.gather(1, order) for t in held]
    return tau


def _solve(value: Tensor, born: Tensor, left: Tensor, query: Tensor, keep: int) -> Tensor:
    """tau [R, Q] of queries [R, Q]: f(tau) = sum of clip(value - tau, 0, 1) = keep over the candidates, [R, M] each.

    f falls, and is linear between the points value and value - 1: search the piece where it passes `keep`.
    """
    value, order = value.sort(dim=1, descending=True)
    born, left = born.gather(1, order), left.gather(1, order)
    met = (born[:, None] <= query[..., None]) & (query[..., None] < left[:, None])
    count = F.pad(met.cumsum(2), (1, 0))  # among the first m
    total = F.pad((met * value[:, None]).cumsum(2), (1, 0))
    ascending = value.flip(1).contiguous()

    def above(x: Tensor) -> tuple[Tensor, Tensor]:
        """How many candidates of each query are larger than x [R, Q], and their sum."""
        place = value.shape[1] - torch.searchsorted(ascending, x.contiguous(), right=True)
        return count.gather(2, place[..., None])[..., 0], total.gather(2, place[..., None])[..., 0]

    points = torch.cat([value, value - 1], 1).sort(dim=1).values
    low, high = torch.zeros_like(query), torch.full_like(query, points.shape[1] - 1)  # the last point has f = 0
    for _ in range(points.shape[1].bit_length()):
        middle = (low + high) >> 1
        x = points.gather(1, middle)
        (some, their), (full, sums) = above(x), above(x + 1)
        larger = (their - x * some) - (sums - (x + 1) * full) > keep
        low, high = torch.where(larger, middle + 1, low), torch.where(larger, high, middle)
        low = torch.minimum(low, high)
    between = (points.gather(1, high) + points.gather(1, (high - 1).clamp(min=0))) / 2
    (some, their), (full, sums) = above(between), above(between + 1)
    tau = (their - sums + full - keep) / (some - full).clamp(min=1)

    number = count[..., -1]
    last, next_ = (_nth(count, value, n) for n in (keep, keep + 1))
    tau = torch.where(last - next_ >= 1, (last - 1 + next_) / 2, tau)
    return tau.masked_fill(number <= keep, -torch.inf)


def _nth(count: Tensor, value: Tensor, n: int) -> Tensor:
    """The n-th largest candidate of each query [R, Q]; the least of all where there are fewer."""
    place = (count[..., 1:] < n).sum(2).clamp(max=value.shape[1] - 1)
    return value.gather(1, place)
