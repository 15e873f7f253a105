"""`attend` in plain torch, forward and backward, without an object of Nq x Nk elements, on any device.

Tokens that live to the end of their segment (the row, a block, a document) go to the fused causal kernel
(`attend_segments`), where torch has one; all else goes through the loop over tiles of queries and their living
keys (`attend_tiles`, planned by `attend_plan`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.lifetimes import Lifetimes, query_intervals
from attention.ops.attend_operands import Gradients, Operands, empty_heads_last, heads_last, row_terms
from attention.ops.attend_plan import FEW_QUERIES, Part, make_parts
from attention.ops.attend_segments import Segments, find_segments, segments_backward, segments_forward
from attention.ops.attend_tiles import tiles_backward, tiles_forward

REMEMBERED = 16  # routes kept for the next call, the backward pass or the next layer
LARGEST_REMEMBERED = 2**16  # numbers in one of them: static patterns, and of those that follow from data the small


def attend_forward(x: Operands, life: Lifetimes, time: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend`, both [B, Nq, H, ...] in memory: the layout in which heads merge without a copy."""
    route = find_route(x, life, time)
    if route.segments is not None:
        out, lse = segments_forward(x.q, x.k, x.v, x.bias, route.segments, x.scale)
        return heads_last(out), heads_last(lse)
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
        dqkv = segments_backward(dout, dlse, x.q, x.k, x.v, x.bias, out, lse, route.segments, x.scale, fixed)
        dq, dk, dv = (heads_last(t) for t in dqkv)
        return Gradients(dq, dk, dv, None, None, None)
    delta, lse = row_terms(dout, dlse, out, lse, x.wide)
    grads = Gradients.empty(x, wants_bias, fixed)
    for part in route.parts:
        tiles_backward(x, part, dout, delta, lse, grads)
    return grads


@dataclass(frozen=True)
class Route:
    """How one call is computed: by segments, or else by parts."""

    segments: Segments | None
    parts: tuple[Part, ...]


_remembered: list[tuple[tuple[object, ...], list[Tensor], Route]] = []


def find_route(x: Operands, life: Lifetimes, time: Tensor | None, wants_bias: bool = False) -> Route:
    """The route for these shapes and lifetimes; from memory, if the very same lifetimes came lately. The fused kernel
    knows no gradient of a bias."""
    fused = x.u is None and x.q.device.type == "cpu" and _alike(x.q.shape[-1], x.v.shape[-1])
    fused = fused and not (wants_bias and x.bias is not None)
    given = [life.birth, life.death] if time is None else [life.birth, life.death, time]
    key = (x.q.shape, x.k.shape[:3], len(given), fused, x.bias is not None, x.q.device)
    for known_key, known, route in _remembered:
        if known_key == key and all(map(torch.equal, known, given)):
            return route
    route = _new_route(x, life, time, fused)
    if x.q.shape[2] > FEW_QUERIES and sum(t.numel() for t in given) <= LARGEST_REMEMBERED:
        # Compared by content, and kept as copies: nobody can change what is remembered.
        _remembered.insert(0, (key, [t.clone() for t in given], route))
        del _remembered[REMEMBERED:]
    return route


def _alike(width: int, value_width: int) -> bool:
    """Whether the fused kernel, which wants one width of all, is worth the zeros behind the narrower: with values twice
    as wide as keys the loop takes 0.8 of its time, with values four times as wide half of it (blocks of 512); where the
    keys are the wider ones, up to three times, the kernel wins."""
    return value_width < 2 * width and width <= 3 * value_width


def _new_route(x: Operands, life: Lifetimes, time: Tensor | None, fused: bool) -> Route:
    (batch, heads, num_queries, _), (kv_heads, num_keys) = x.q.shape, x.k.shape[1:3]
    start, stop = query_intervals(
        life, time, heads=heads, kv_heads=kv_heads, num_queries=num_queries, num_keys=num_keys
    )
    segments = find_segments(start, stop, num_queries, x.bias is not None) if fused else None
    if segments is not None:
        return Route(segments, ())
    group = heads // kv_heads
    return Route(None, make_parts(start, stop, batch=batch, kv_heads=kv_heads, group=group, num_queries=num_queries))
