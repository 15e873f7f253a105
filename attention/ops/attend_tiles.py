"""The tile loop of `attend`: each tile of queries against its living keys, all rows of a part in one product.

The backward pass recomputes the weights from lse, so nothing larger than a tile's logits ever exists. Logits are
kept in base 2: torch's float32 exp is 5 times slower than its exp2 on a CPU, and 20 to 100 times where it
underflows, as it does for all that is masked. (0.7, 3 to 20, and always 0.15 ns per element, AVX-512, torch 2.13.)

Legend of shapes: H query heads, G key heads, r = H / G, Nq queries, Nk keys, D width of queries and keys, Dv
width of values; b, g the examples and key heads of a part; m queries and W keys of a tile; R rows of keys in a
product, M queries of a row. R M = b g r m: a row holds the queries of a key head, or, where every query head
has a list of keys of its own, of one query head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.ops.attend_plan import Part, Tile

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)


@dataclass(frozen=True)
class Operands:
    """q [B, H, Nq, D], k [B, G, Nk, D], v [B, G, Nk, Dv]; bias and u [B, G, Nk], tau [B, H, Nq], or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    u: Tensor | None
    tau: Tensor | None
    scale: float

    @property
    def wide(self) -> torch.dtype:
        """What logits, weights and sums are computed in: at least float32."""
        return torch.promote_types(self.q.dtype, torch.float32)


@dataclass(frozen=True)
class Gradients:
    """To be filled, in the shapes of the operands; q, k, v in their type, the others in at least float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    u: Tensor | None
    tau: Tensor | None


def tiles_forward(x: Operands, part: Part, out: Tensor, lse: Tensor) -> None:
    """Fills the part of out [B, H, Nq, Dv] and lse [B, H, Nq]."""
    rows = _Rows(x, part)
    out, lse = rows.of_queries(out), rows.of_queries(lse)
    for tile in part.plan:
        here = _Visit(rows, tile)
        weights, share = here.logits()
        top = weights.amax(-1, keepdim=True) if tile.width else weights.new_zeros(*weights.shape[:2], 1)
        top = top.masked_fill_(top == -torch.inf, 0.0)
        weights.sub_(top).exp2_()
        if share is not None:
            weights.mul_(share)
        total = _row_sum(weights)
        here.write(lse, (total.log2() + top).squeeze(-1) * LN_2)
        average = torch.bmm(weights, here.keys(rows.v))
        here.write(out, average.div_(total.masked_fill(total == 0, 1.0)))


def tiles_backward(x: Operands, part: Part, dout: Tensor, delta: Tensor, lse: Tensor, grads: Gradients) -> None:
    """Fills the part of the gradients, that of a logit being p (dout v^T - delta).

    dout [B, H, Nq, Dv]; delta and lse [B, H, Nq], lse = +inf for a query that meets nobody: its weights are 0.
    """
    rows = _Rows(x, part)
    dout, delta, lse, dq = (rows.of_queries(t) for t in (dout, delta, lse, grads.q))
    dtau = None if grads.tau is None else rows.of_queries(grads.tau)
    dk, dv = rows.k.new_zeros(rows.k.shape), rows.v.new_zeros(rows.v.shape)
    dbias, du = (None if t is None else dk.new_zeros(dk.shape[:2]) for t in (grads.bias, grads.u))
    for tile in part.plan:
        here = _Visit(rows, tile)
        dout_tile = here.queries(dout)
        weights, share = here.logits()
        weights.sub_(here.queries(lse)[..., None] * LOG2_E).exp2_()
        dweights = torch.bmm(dout_tile, here.keys(rows.v).transpose(1, 2)).sub_(here.queries(delta)[..., None])
        if share is not None:
            # The weight is share * exp(logit): no gradient needs a division by the share, which may be 0.
            inside = (weights * dweights).masked_fill_((share <= 0) | (share >= 1), 0.0)
            if du is not None and dtau is not None:
                here.add(du, inside.sum(1))
                here.write(dtau, inside.sum(-1).neg_())
            weights.mul_(share)
        here.add(dv, torch.bmm(weights.transpose(1, 2), dout_tile))
        dlogits = dweights.mul_(weights)
        here.write(dq, torch.bmm(dlogits, here.key_tile).mul_(x.scale))
        here.add(dk, torch.bmm(dlogits.transpose(1, 2), here.query_tile))
        if dbias is not None:
            here.add(dbias, dlogits.sum(1))
    dk.mul_(LN_2)  # the query tiles are in base 2
    for target, grad in ((grads.k, dk), (grads.v, dv), (grads.bias, dbias), (grads.u, du)):
        if target is not None and grad is not None:
            rows.write_keys(target, grad)


def _row_sum(weights: Tensor) -> Tensor:
    """[R, M, W] -> [R, M, 1]."""
    if weights.dtype == torch.float64:
        # A product adds up in the order of the keys, zeros or not, so no bit of a query's sum depends on who else
        # is listed; `sum` regroups its terms by the width. (In float32 the products regroup, too.)
        return torch.bmm(weights, weights.new_ones(1, 1, 8).expand(*weights.shape[::2], 8))[..., :1]
    return weights.sum(-1, keepdim=True)


class _Rows:
    """The operands of a part: keys as rows, queries as views [b, g, r, Nq, ...]."""

    def __init__(self, x: Operands, part: Part) -> None:
        self.part, self.scale, self.wide = part, x.scale, x.wide
        self.group = x.q.shape[1] // x.k.shape[1]
        self.q = self.of_queries(x.q)
        self.tau = None if x.tau is None else self.of_queries(x.tau)
        self.k, self.v = self._of_keys(x.k), self._of_keys(x.v)
        self.bias = None if x.bias is None else self._of_keys(x.bias)
        self.u = None if x.u is None else self._of_keys(x.u)

    def of_queries(self, t: Tensor) -> Tensor:
        """[B, H, Nq, ...] -> a view of this part, [b, g, r, Nq, ...]."""
        return t.unflatten(1, (-1, self.group))[self.part.examples, self.part.heads]

    def _of_keys(self, t: Tensor) -> Tensor:
        """[B, G, Nk, ...] -> [b g, Nk, ...]; where keys are listed, an empty row behind them stands for "no key"."""
        t = t[self.part.examples, self.part.heads].to(self.wide).flatten(0, 1)
        return torch.cat([t, t.new_zeros(t.shape[0], 1, *t.shape[2:])], 1) if self.part.plan.listed else t

    def write_keys(self, target: Tensor, grad: Tensor) -> None:
        """The reverse of `_of_keys`, into the part's place in `target`."""
        mine = target[self.part.examples, self.part.heads]
        mine.copy_(grad[:, : mine.shape[2]].unflatten(0, mine.shape[:2]))


class _Visit:
    """One tile of a part: reads and writes in the shapes of the products, [R, M, ...] and [R, W, ...]."""

    def __init__(self, rows: _Rows, tile: Tile) -> None:
        self.rows, self.tile = rows, tile
        self.grid = (*rows.q.shape[:3], tile.hi - tile.lo)  # b, g, r, m
        self.index: Tensor | None = None  # [b g, own, W] into the rows laid end to end
        own = 1
        if isinstance(tile.keys, Tensor):
            own = rows.part.lists[2]
            b, g = self.grid[:2]
            begin = torch.arange(0, rows.k.shape[0] * rows.k.shape[1], rows.k.shape[1], device=rows.k.device)
            self.index = (begin.view(b, g, 1, 1) + tile.keys.view(*rows.part.lists, -1)).flatten(0, 1)
        self.num_rows = self.grid[0] * self.grid[1] * own
        self.query_tile = self.queries(rows.q) * (rows.scale * LOG2_E)
        self.key_tile = self.keys(rows.k)

    def queries(self, t: Tensor) -> Tensor:
        """[b, g, r, Nq, ...] -> [R, M, ...]."""
        t = t[:, :, :, self.tile.lo : self.tile.hi].to(self.rows.wide)
        return t.reshape(self.num_rows, -1, *t.shape[4:])

    def write(self, target: Tensor, values: Tensor) -> None:
        """[R, M, ...] into its place in [b, g, r, Nq, ...]."""
        target[:, :, :, self.tile.lo : self.tile.hi] = values.view(*self.grid, *values.shape[2:])

    def keys(self, t: Tensor) -> Tensor:
        """[b g, Nk, ...] -> [R, W, ...]."""
        if self.index is None:
            return t[:, self.tile.keys]
        return t.flatten(0, 1).index_select(0, self.index.flatten()).view(self.num_rows, -1, *t.shape[2:])

    def add(self, total: Tensor, values: Tensor) -> None:
        """[R, W, ...] on top of its keys in [b g, Nk, ...]; in a fixed order, so the same in every run."""
        if self.index is None:
            total[:, self.tile.keys] += values
            return
        total, values = total.flatten(0, 1), values.view(*self.index.shape, *values.shape[2:])
        # Within one list no key stands twice (but "no key", which collects zeros): a copy is an addition.
        for own in range(self.index.shape[1]):
            place = self.index[:, own].flatten()
            total.index_copy_(0, place, total.index_select(0, place).add_(values[:, own].flatten(0, 1)))

    def logits(self) -> tuple[Tensor, Tensor | None]:
        """Logits [R, M, W] in base 2, -inf where query and key do not meet, and the share c [R, M, W] of a gate."""
        logits = torch.bmm(self.query_tile, self.key_tile.transpose(1, 2))
        if self.rows.bias is not None:
            logits += self.keys(self.rows.bias)[:, None] * LOG2_E
        by_head = logits.view(*self.grid, -1)
        number = torch.arange(self.tile.lo, self.tile.hi, dtype=torch.int32, device=logits.device)[:, None]
        start, stop = (t.view(*self.rows.part.lists, 1, -1) for t in (self.tile.start, self.tile.stop))
        for columns in self.tile.masked:
            met = (start[..., columns] <= number) & (number < stop[..., columns])
            by_head[..., columns] += torch.where(met, 0.0, -torch.inf)
        if self.rows.u is None or self.rows.tau is None:
            return logits, None
        share = gate_share(self.keys(self.rows.u)[:, None], self.queries(self.rows.tau)[..., None])
        return logits.masked_fill_(share == 0, -torch.inf), share


def gate_share(u: Tensor, tau: Tensor) -> Tensor:
    """c = clip(u - tau, 0, 1), broadcast; 1 where tau is -inf, whatever u."""
    largest = torch.finfo(u.dtype).max
    above = u.clamp(-largest, largest) - tau
    # Not clamp: its gradient does not vanish at the ends of the interval.
    return torch.where(above >= 1, 1.0, torch.where(above > 0, above, 0.0))
