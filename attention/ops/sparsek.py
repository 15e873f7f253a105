"""The threshold of SPARSEK: the projection of all scores so far onto {0 <= c <= 1, sum of c = keep}.

Source: Lou et al., "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers" (2024,
arXiv 2406.16747). The projection of scores u is c = clip(u - tau, 0, 1) with one threshold tau, which never falls as
scores are added: so who has left (c = 0) stays away, and has a lifetime.

Legend of shapes: B batch, G key heads, N tokens; R = B G lists; Q queries of a chunk, M candidates that they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.lifetimes import FOREVER
from attention.ops import select_native
from attention.ops.select import streaming_top_k

CHUNK = 64  # tokens that share one sorted list of candidates
AT_ONCE = 2**19  # numbers in the largest tensor: 8 MiB


def sparsek_threshold(
    u: Tensor, keep: int, candidates: int, *, delay: int = 0, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Thresholds at the time of each token, and when each token's c becomes 0 for good.

    u       [B, G, N], float32 or float64, of tokens in the order of time. From one that is not finite on, tau is NaN
            to the end of the document
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
    but for that middle. Work N (candidates / CHUNK + CHUNK) and N log N; memory N, and a few tensors of AT_ONCE numbers
    (or of R (candidates + CHUNK), if that is more).
    ValueError for a `keep` below 1, fewer `candidates` than that, or a negative `delay`.
    """
    if keep < 1 or candidates < keep or delay < 0:
        raise ValueError(f"expected 1 <= keep <= candidates and delay >= 0, got {keep}, {candidates} and {delay}")
    number = u.shape[-1]
    document = (
        torch.zeros(u.shape, dtype=torch.int64, device=u.device)
        if start is None
        else start.expand(u.shape).contiguous()
    )
    end = torch.searchsorted(document, document, right=True)
    left = streaming_top_k(u, candidates, start=None if start is None else document)
    tau, death = _Threshold.apply(u, left, document, end, keep, candidates)
    if delay:
        tau = F.pad(tau, (delay, 0), value=-torch.inf)[..., :number]
        before = F.pad(document, (delay, 0), value=-2)[..., :number]
        tau = tau.masked_fill(before != document, -torch.inf)
        death = torch.minimum(death + delay, end)
    return tau, death.masked_fill(death >= number, FOREVER)


def partial_from(u: Tensor, tau: Tensor, death: Tensor, delay: int = 0) -> Tensor:
    """The first token at or behind j + delay at which c_tj < 1, or else its death, int64 [B, G, N]; as above."""
    number = u.shape[-1]
    begin = torch.arange(delay, delay + number, device=u.device).clamp(max=number)
    return _first(tau, u - 1, begin.expand(u.shape), death.clamp(max=number), reached=False)


class _Threshold(torch.autograd.Function):
    """Without delay: tau [B, G, N], and the token at which each one dies, at most the end of its document."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, left: Tensor, document: Tensor, end: Tensor, keep: int, candidates: int
    ) -> tuple[Tensor, Tensor]:
        wrong = ~u.isfinite()
        finite = u.masked_fill(wrong, 0.0)
        if select_native.takes(u):
            tau = select_native.sparsek_thresholds(finite, left, document, keep)
        else:
            tau = _thresholds(finite, left, document, keep, candidates)
        before = F.pad(wrong.cumsum(-1), (1, 0))
        first = torch.searchsorted(document, document)
        tau = tau.masked_fill(before[..., 1:] > before.gather(-1, first), torch.nan)
        token = torch.arange(u.shape[-1], device=u.device).expand(u.shape)
        death = _first(tau, u, token, torch.minimum(left, end), reached=True)
        ctx.save_for_backward(u, tau, death)
        ctx.mark_non_differentiable(death)
        return tau, death

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """tau moves with the mean of those with 0 < c < 1: a token is one of them from the time at which tau exceeds
        u - 1 until its death, so its gradient is a sum over an interval."""
        u, tau, death = ctx.saved_tensors
        begin = partial_from(u, tau, death)
        steps = torch.zeros(*u.shape[:-1], u.shape[-1] + 1, dtype=torch.int64, device=u.device)
        ones = torch.ones_like(begin)
        inside = steps.scatter_add(-1, begin, ones).scatter_add(-1, death, -ones).cumsum(-1)[..., :-1]
        share = torch.where(inside > 0, grad.double() / inside.clamp(min=1), 0.0)
        total = F.pad(share.cumsum(-1), (1, 0))
        return (total.gather(-1, death) - total.gather(-1, begin)).to(u.dtype), None, None, None, None, None


def _first(tau: Tensor, bound: Tensor, low: Tensor, high: Tensor, *, reached: bool) -> Tensor:
    """The first token from `low` on at which tau >= bound (reached) or tau > bound, `high` if none before it."""
    last = tau.shape[-1] - 1
    high = torch.maximum(low, high)
    for _ in range((last + 1).bit_length()):
        middle = (low + high) >> 1
        there = tau.gather(-1, middle.clamp(max=last))
        found = (there >= bound if reached else there > bound) | (middle >= high)
        low, high = torch.where(found, low, middle + 1), torch.where(found, middle, high)
    return high


def _how_many(true: Callable[[Tensor], Tensor], number: int, like: Tensor) -> Tensor:
    """Of how many of 0..number-1 it is true, if of the first ones only; int64 like `like`."""
    found = torch.zeros_like(like)
    for bit in reversed(range(number.bit_length())):
        found.add_(true((found + (2**bit - 1)).clamp_(max=number - 1)), alpha=2**bit)
    return found.clamp_(max=number)


# The thresholds. At each token one comes to the candidates, and if there are as many as there may be, one leaves. So
# in a chunk of tokens the candidates of each one are those at the chunk's begin, sorted once, and a few changes.


def _thresholds(u: Tensor, left: Tensor, document: Tensor, keep: int, candidates: int) -> Tensor:
    """tau [B, G, N] of u [B, G, N], where token j is a candidate from j until `left`, or its document's end."""
    shape = u.shape
    u, left, document = (t.flatten(0, 1) for t in (u, left, document))
    rows, number = u.shape
    candidates = min(candidates, number)
    filled = -number % CHUNK
    value = F.pad(u.double(), (0, filled))
    document = F.pad(document, (0, filled), value=FOREVER)
    seats = _Seats.of(F.pad(left, (0, filled), value=FOREVER), document, candidates)
    chunks = max(1, AT_ONCE // (rows * max(2 * CHUNK * CHUNK, candidates + CHUNK)))
    chunks = min(chunks, (number + filled) // CHUNK)
    # Kept from one to the next: new memory of that size costs more than all that is done in it.
    tables = tuple(value.new_empty(rows, chunks, CHUNK, 2 * CHUNK + 1) for _ in range(2))
    tau = []
    for begin in range(0, number, chunks * CHUNK):
        some = _Chunks.of(value, document, seats, begin, min(begin + chunks * CHUNK, number + filled), tables)
        tau.append(some.thresholds(keep).flatten(1, 2))
    return torch.cat(tau, 1)[:, :number].to(u.dtype).view(shape)


@dataclass
class _Seats:
    """Who takes the seat of whom among the candidates: [R, N] of tokens.

    leaver   the token that leaves when this one comes, itself if it is outranked at once, -1 if nobody
    seat     0..candidates-1; `candidates` of those that are outranked at once
    taken    [R, candidates + 1]: the last token that took each seat, as far as `bases` has come; -1 before the first
    """

    leaver: Tensor
    seat: Tensor
    taken: Tensor

    @staticmethod
    def of(left: Tensor, document: Tensor, candidates: int) -> _Seats:
        rows, number = left.shape
        token = torch.arange(number, device=left.device).expand(rows, -1)
        # Who leaves with the document has a seat that nobody takes over.
        over = torch.where(left < number, left, number)
        leaver = F.pad(torch.full_like(token, -1), (0, 1), value=-1).scatter_(1, over, token)[:, :number]
        root = torch.where(leaver < 0, token, leaver)
        for _ in range(number.bit_length()):  # to the one who leaves, to the one who left for them, ..
            root = root.gather(1, root)
        seat = root - torch.searchsorted(document, document)
        seat = torch.where((leaver == token) | (seat >= candidates), candidates, seat)
        return _Seats(leaver, seat, token.new_full((rows, candidates + 1), -1))

    def bases(self, begin: int, end: int) -> Tensor:
        """The tokens [R, chunks, candidates] that sit where each chunk of begin..end-1 begins, -1 for none."""
        rows, places = self.taken.shape
        chunks = (end - begin) // CHUNK
        token = torch.arange(begin, end, device=self.seat.device).expand(rows, -1)
        cell = ((token - begin) // CHUNK + 1) * places + self.seat[:, begin:end]
        table = F.pad(self.taken, (0, chunks * places), value=-1).scatter_reduce_(1, cell, token, "amax")
        table = table.view(rows, chunks + 1, places).cummax(1).values
        self.taken = table[:, -1]
        return table[:, :-1, :-1]


@dataclass(frozen=True, eq=False)
class _Chunks:
    """Chunks of C queries, and everybody who is a candidate in one: the base, who sit where it begins, and the C that
    come; M in all, sorted. Beside the base there are 2 C changes, those that come and those that leave, sorted too.

    value    [R, n, M], descending
    base     [R, n, M + 1] and `based`: of the first m, how many are of the base, and their sum
    since    [R, n, M + 1]: how many changes concern the first m
    count    [R, n, C, 2 C + 1] and `total`: for each query what the first changes add to the number and the sum
    old      [R, n, C]: 1 for the queries that meet the base, 0 where another document has begun
    """

    value: Tensor
    base: Tensor
    based: Tensor
    since: Tensor
    count: Tensor
    total: Tensor
    old: Tensor

    @staticmethod
    def of(value: Tensor, document: Tensor, seats: _Seats, begin: int, end: int, tables: Sequence[Tensor]) -> _Chunks:
        """Of the tokens begin..end-1. tables: two [R, n or more, C, 2 C + 1], which become `count` and `total`."""
        tokens = seats.bases(begin, end)
        chunks, candidates = tokens.shape[1:]
        documents, new = (t[:, begin:end].unflatten(1, (chunks, CHUNK)) for t in (document, value))
        before = F.pad(document, (1, 0), value=-2)[:, begin:end:CHUNK, None]
        flat = tokens.clamp(min=0).flatten(1)
        sits = (tokens >= 0) & (document.gather(1, flat).view_as(tokens) == before)
        old = torch.where(sits, value.gather(1, flat).view_as(tokens), 0.0)

        sorted_, order = torch.cat([old, new], 2).sort(dim=2, descending=True, stable=True)
        sits = F.pad(sits.double(), (0, CHUNK)).gather(2, order)
        numbers = torch.arange(order.shape[2], device=order.device).expand_as(order)
        place = torch.empty_like(order).scatter_(2, order, numbers)

        first = torch.arange(begin, end, CHUNK, device=order.device)[:, None]
        leaver = seats.leaver[:, begin:end]
        seat = seats.seat.gather(1, leaver.clamp(min=0)).unflatten(1, (chunks, CHUNK))
        leaver = leaver.unflatten(1, (chunks, CHUNK))
        column = torch.where(leaver >= first, candidates + leaver - first, seat).clamp(max=candidates + CHUNK - 1)
        concerned = torch.cat([place[:, :, candidates:], place.gather(2, column)], 2)
        sign = torch.cat([torch.ones_like(new), -(leaver >= 0).double()], 2)
        concerned, change = concerned.sort(dim=2, stable=True)  # of one token, to come before to leave
        since = torch.zeros_like(F.pad(order, (0, 1))).scatter_add_(2, concerned + 1, torch.ones_like(concerned))

        # A change counts from its own token on, for queries of the same document: in floats, where masks are slow. In
        # front of all changes stands none.
        sign, when = (F.pad(t, (1, 0))[:, :, None] for t in (sign.gather(2, change), (change % CHUNK).double()))
        sum_ = sign * F.pad(sorted_.gather(2, concerned), (1, 0))[:, :, None]
        began = torch.searchsorted(document, document[:, begin:end].contiguous()).unflatten(1, (chunks, CHUNK)) - first
        own = torch.arange(CHUNK, dtype=when.dtype, device=order.device)[:, None]
        count, met = (t[:, :chunks] for t in tables)
        torch.minimum(torch.sub(own, when, out=met), torch.sub(when, began.double()[..., None], out=count), out=met)
        met.add_(1.0).clamp_(0.0, 1.0)
        torch.mul(met, sign, out=count)
        return _Chunks(
            value=sorted_,
            base=F.pad(sits.cumsum(2), (1, 0)),
            based=F.pad((sits * sorted_).cumsum(2), (1, 0)),
            since=since.cumsum(2),
            count=count.cumsum_(3),
            total=met.mul_(sum_).cumsum_(3),
            old=(documents == before).double(),
        )

    def thresholds(self, keep: int) -> Tensor:
        """tau [R, n, C]."""
        value = self.value
        number = value.shape[2]
        upper, lower = value + 1, value - 1
        ascending = value.flip(2).contiguous()
        above = number - torch.searchsorted(ascending, upper.contiguous(), right=True)
        below = number - torch.searchsorted(ascending, lower.contiguous(), right=True)
        place = torch.arange(number, device=value.device).expand_as(above)
        all_ = torch.full_like(self.old, number, dtype=torch.int64)

        def larger(x: Tensor, low: Tensor, high: Tensor, is_short: Callable[[Tensor], Tensor]) -> Tensor:
            """The first m of which the shares at x[m] sum up to enough."""
            excess = (self.based.gather(2, low) - x * self.base.gather(2, low)) - (
                self.based.gather(2, high) - (x + 1) * self.base.gather(2, high)
            )
            low, high = (self.since.gather(2, t) for t in (low, high))

            def too_few(m: Tensor) -> Tensor:
                x_m = x.gather(2, m)
                low_m, high_m = (t.gather(2, m)[..., None] for t in (low, high))
                inside = self.total.gather(3, low_m).sub_(self.total.gather(3, high_m))[..., 0]
                inside.addcmul_(x_m, self.count.gather(3, low_m)[..., 0], value=-1.0)
                inside.addcmul_(x_m + 1, self.count.gather(3, high_m)[..., 0])
                return is_short(inside.addcmul_(self.old, excess.gather(2, m)))

            return _how_many(too_few, number, all_)

        some = larger(value, place, above, lambda f: f < keep)
        full = larger(lower, below, place, lambda f: f <= keep)
        (many, their), (whole, sums) = self._first(some), self._first(full)
        tau = (their - sums + whole - keep) / (many - whole).clamp(min=1)

        def nth(n: int) -> Tensor:
            m = _how_many(lambda m: self._first(m + 1)[0] < n, number, all_)
            return value.gather(2, m.clamp(max=number - 1))

        last, next_ = nth(keep), nth(keep + 1)
        tau = torch.where((last - next_ >= 1) | (many <= whole), (last - 1 + next_) / 2, tau)
        return tau.masked_fill(self._first(all_)[0] <= keep, -torch.inf)

    def _first(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """For each query [R, n, C], how many of the first m are its candidates, and their sum."""
        change = self.since.gather(2, m)[..., None]
        count, total = (t.gather(3, change)[..., 0] for t in (self.count, self.total))
        return count + self.old * self.base.gather(2, m), total + self.old * self.based.gather(2, m)
