"""The tile loop of `attend`: each tile of queries against its living keys, all rows of a part in one product.

The backward pass recomputes the weights from lse, so nothing larger than a tile's logits ever exists. Logits are
kept in base 2: torch's float32 exp is 5 times slower than its exp2 on a CPU, and 20 to 100 times where it
underflows, as it does for all that is masked. (0.7, 3 to 20, and always 0.15 ns per element, AVX-512, torch 2.13.)

Legend of shapes: R rows of a product with M queries and W keys each (`attend_visit` says of what), H query heads,
G key heads, Nq queries, Nk keys, D width of queries and keys, Dv width of values.
"""

import math

import torch
from torch import Tensor

from attention.ops.attend_operands import Gradients, Operands
from attention.ops.attend_plan import Part
from attention.ops.attend_visit import Rows, Visit

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)


def tiles_forward(x: Operands, part: Part, out: Tensor, lse: Tensor) -> None:
    """Fills the part of out [B, H, Nq, Dv] and lse [B, H, Nq]."""
    rows = Rows(x, part)
    out, lse = rows.of_queries(out), rows.of_queries(lse)
    for tile in part.tiles:
        here = rows.visit(tile)
        query_tile = here.queries(rows.q) * (x.scale * LOG2_E)
        weights, share = _logits(here, query_tile, here.keys(rows.k))
        top = weights.amax(-1, keepdim=True) if tile.width else weights.new_zeros(*weights.shape[:2], 1)
        top = top.masked_fill_(top == -torch.inf, 0.0)
        weights.sub_(top).exp2_()
        if share is not None:
            weights.mul_(share)
        total = _row_sum(weights)
        here.write(lse, (total.log2() + top).squeeze(-1) * LN_2)
        average = torch.bmm(weights, here.keys(rows.v))
        here.write(out, average.div_(total.masked_fill_(total == 0, 1.0)))


def tiles_backward(x: Operands, part: Part, dout: Tensor, delta: Tensor, lse: Tensor, grads: Gradients) -> None:
    """Fills the part of the gradients, that of a logit being p (dout v^T - delta).

    dout [B, H, Nq, Dv]; delta and lse [B, H, Nq], lse = +inf for a query that meets nobody: its weights are 0.
    """
    rows = Rows(x, part)
    dout, delta, lse, dq = (rows.of_queries(t) for t in (dout, delta, lse, grads.q))
    dtau = None if grads.tau is None else rows.of_queries(grads.tau)
    dk, dv = rows.k.new_zeros(rows.k.shape), rows.v.new_zeros(rows.v.shape)
    dbias, du = (None if t is None else dk.new_zeros(dk.shape[:2]) for t in (grads.bias, grads.u))
    for tile in part.tiles:
        here = rows.visit(tile)
        query_tile, key_tile, dout_tile = here.queries(rows.q) * x.scale, here.keys(rows.k), here.queries(dout)
        weights, share = _logits(here, query_tile * LOG2_E, key_tile)
        weights.sub_(here.queries(lse)[..., None] * LOG2_E).exp2_()
        dweights = torch.bmm(dout_tile, here.keys(rows.v).transpose(1, 2)).sub_(here.queries(delta)[..., None])
        if share is not None and du is not None and dtau is not None:
            # The weight is share * exp(logit): no gradient needs a division by the share, which may be 0.
            inside = (weights * dweights).masked_fill_((share <= 0) | (share >= 1), 0.0)
            here.add(du, inside.sum(1))
            here.write(dtau, inside.sum(-1).neg_())
            weights.mul_(share)
        here.add(dv, torch.bmm(weights.transpose(1, 2), dout_tile))
        dlogits = dweights.mul_(weights)
        here.write(dq, torch.bmm(dlogits, key_tile).mul_(x.scale))
        here.add(dk, torch.bmm(dlogits.transpose(1, 2), query_tile))
        if dbias is not None:
            here.add(dbias, dlogits.sum(1))
    for target, grad in ((grads.k, dk), (grads.v, dv), (grads.bias, dbias), (grads.u, du)):
        if target is not None and grad is not None:
            rows.write_keys(target, grad)


def _logits(here: Visit, query_tile: Tensor, key_tile: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits [R, M, W] in base 2, -inf where query and key do not meet, and the share c [R, M, W] of a gate."""
    rows = here.rows
    logits = torch.bmm(query_tile, key_tile.transpose(1, 2))
    if rows.bias is not None:
        logits += here.keys(rows.bias)[:, None] * LOG2_E
    here.mask(logits)
    if rows.u is None or rows.tau is None:
        return logits, None
    share = gate_share(here.keys(rows.u)[:, None], here.queries(rows.tau)[..., None])
    return logits.masked_fill_(share == 0, -torch.inf), share


def _row_sum(weights: Tensor) -> Tensor:
    """[R, M, W] -> [R, M, 1]."""
    if weights.dtype == torch.float64:
        # A product adds up in the order of the keys, zeros or not, so no bit of a query's sum depends on who else
        # is listed; `sum` regroups its terms by the width. (In float32 the products regroup, too.)
        return torch.bmm(weights, weights.new_ones(1, 1, 8).expand(*weights.shape[::2], 8))[..., :1]
    return weights.sum(-1, keepdim=True)


def gate_share(u: Tensor, tau: Tensor) -> Tensor:
    """c = clip(u - tau, 0, 1), broadcast; 1 where tau is -inf, whatever u."""
    largest = torch.finfo(u.dtype).max
    above = u.clamp(-largest, largest) - tau
    # Not clamp: its gradient does not vanish at the ends of the interval.
    return torch.where(above >= 1, 1.0, torch.where(above > 0, above, 0.0))
