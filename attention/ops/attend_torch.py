"""`attend` in plain torch, forward and backward, without an object of Nq x Nk elements, on any device.

Tokens that live to the end of their segment (the row, a block, a document) go to the fused causal kernel
(`attend_segments`), where torch has one; all else goes through the loop over tiles of queries and their living
keys (`attend_tiles`, planned by `attend_plan`).
"""

from torch import Tensor

from attention.lifetimes import Lifetimes
from attention.ops.attend_operands import Gradients, Operands, empty_heads_last, row_terms
from attention.ops.attend_route import find_route
from attention.ops.attend_segments import segments_backward, segments_forward
from attention.ops.attend_tiles import tiles_backward, tiles_forward


def attend_forward(x: Operands, life: Lifetimes, time: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend`, both [B, Nq, H, ...] in memory: the layout in which heads merge without a copy."""
    route = find_route(x, life, time)
    if route.segments is not None:
        return segments_forward(x, route.segments)
    out = empty_heads_last(x.q, x.v.shape[-1])
    lse = empty_heads_last(x.q, dtype=x.wide)
    for part in route.parts:
        tiles_forward(x, part, out, lse)
    return out, lse


def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    x: Operands,
    life: Lifetimes,
    time: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wants_bias: bool = True,
    fixed: int = 0,
) -> Gradients:
    """Gradients of `attend` in all its operands, from those of out and, unless None, lse; of a bias if wanted, and of k
    without its last `fixed` columns."""
    route = find_route(x, life, time, wants_bias)
    if route.segments is not None:
        return segments_backward(dout, dlse, x, out, lse, route.segments, fixed)
    delta, lse = row_terms(dout, dlse, out, lse, x.wide)
    grads = Gradients.empty(x, wants_bias, fixed)
    for part in route.parts:
        tiles_backward(x, part, dout, delta, lse, grads)
    return grads
