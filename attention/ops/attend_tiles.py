"""The tile loop of `attend`: each tile of queries against its living keys, all rows of a part in one product.

The backward pass recomputes the weights from lse, so nothing larger than a tile's logits ever exists. Logits are
kept in base 2: torch's float32 exp is 5 times slower than its exp2 on a CPU, and 20 to 100 times where it
underflows, as it does for all that is masked. (0.7, 3 to 20, and always 0.15 ns per element, AVX-512, torch 2.13.)
Masks are computed in floats, too: a comparison or a choice takes 0.6 ns per element, a sum, product or clamp 0.1.

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
_LARGEST_EXPONENT = 0.75  # of what floats can hold: of pairs of share 0, which any finite weight serves


def tiles_forward(x: Operands, part: Part, out: Tensor, lse: Tensor) -> None:
    """Fills the part of out [B, H, Nq, Dv] and lse [B, H, Nq]."""
    rows = Rows(x, part)
    out, lse = rows.of_queries(out), rows.of_queries(lse)
    for tile in part.tiles:
        here = rows.visit(tile)
        query_tile = here.queries(rows.q) * (x.scale * LOG2_E)
        weights, share = _logits(here, query_tile, here.keys(rows.k)), _share(here)
        if share is not None:
            weights += share.ceil().reciprocal_().neg_().add_(1.0)  # 0, or -inf where the share is 0
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
    wanted = grads.k.shape[-1]  # columns of k, the first of them
    dk, dv = rows.k.new_zeros(*rows.k.shape[:2], wanted), rows.v.new_zeros(rows.v.shape)
    dbias, du = (None if t is None else dk.new_zeros(dk.shape[:2]) for t in (grads.bias, grads.u))
    for tile in part.tiles:
        here = rows.visit(tile)
        query_tile, key_tile, dout_tile = here.queries(rows.q) * x.scale, here.keys(rows.k), here.queries(dout)
        weights, share = _logits(here, query_tile * LOG2_E, key_tile), _share(here)
        weights.sub_(here.queries(lse)[..., None] * LOG2_E)
        if share is not None:
            weights.clamp_(max=_LARGEST_EXPONENT * math.log2(torch.finfo(x.wide).max))
        weights.exp2_()
        dweights = torch.bmm(dout_tile, here.keys(rows.v).transpose(1, 2)).sub_(here.queries(delta)[..., None])
        if share is not None and du is not None and dtau is not None:
            # The weight is share * exp(logit): no gradient needs a division by the share, which may be 0.
            inside = torch.ops.aten.hardtanh_backward(weights * dweights, share, 0.0, 1.0)  # 0 at the ends
            here.add(du, inside.sum(1))
            here.write(dtau, inside.sum(-1).neg_())
            weights.mul_(share)
        here.add(dv, torch.bmm(weights.transpose(1, 2), dout_tile))
        dlogits = dweights.mul_(weights)
        here.write(dq, torch.bmm(dlogits, key_tile).mul_(x.scale))
        here.add(dk, torch.bmm(dlogits.transpose(1, 2), query_tile[..., :wanted]))
        if dbias is not None:
            here.add(dbias, dlogits.sum(1))
    for target, grad in ((grads.k, dk), (grads.v, dv), (grads.bias, dbias), (grads.u, du)):
        if target is not None and grad is not None:
            rows.write_keys(target, grad)


def _logits(here: Visit, query_tile: Tensor, key_tile: Tensor) -> Tensor:
    """Logits [R, M, W] in base 2; where query and key do not meet -inf, unless a gate says so."""
    logits = torch.bmm(query_tile, key_tile.transpose(1, 2))
    if here.rows.bias is not None:
        logits += here.keys(here.rows.bias)[:, None] * LOG2_E
    if here.rows.u is None:
        here.mask(logits)
    return logits


def _share(here: Visit) -> Tensor | None:
    """The share c [R, M, W] of a gate, clip(u - tau, 0, 1), 0 where query and key do not meet; None without a gate."""
    u, tau = here.rows.u, here.rows.tau
    if u is None or tau is None:
        return None
    largest = torch.finfo(u.dtype).max  # c is 1 where tau is -inf, whatever u
    share = (here.keys(u).clamp(-largest, largest)[:, None] - here.queries(tau)[..., None]).clamp_(0.0, 1.0)
    here.silence(share)
    return share


def _row_sum(weights: Tensor) -> Tensor:
    """[R, M, W] -> [R, M, 1]."""
    if weights.dtype == torch.float64:
        # A product adds up in the order of the keys, zeros or not, so no bit of a query's sum depends on who else
        # is listed; `sum` regroups its terms by the width. (In float32 the products regroup, too.)
        return torch.bmm(weights, weights.new_ones(1, 1, 8).expand(*weights.shape[::2], 8))[..., :1]
    return weights.sum(-1, keepdim=True)
