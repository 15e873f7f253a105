"""`attend` in plain torch, forward and backward, without an object of Nq x Nk elements, on any device.

Tokens that live to the end of their segment (the row, a block, a document) go to the fused causal kernel
(`attend_segments`), where torch has one; all else goes through the loop over tiles of queries and their living
keys (`attend_tiles`, planned by `attend_plan`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.lifetimes import Lifetimes, query_intervals
from attention.ops.attend_plan import Part, make_parts
from attention.ops.attend_segments import Run, find_segments, segments_backward, segments_forward
from attention.ops.attend_tiles import Gradients, Operands, tiles_backward, tiles_forward

REMEMBERED = 16  # routes kept for the next call, the backward pass or the next layer
LARGEST_REMEMBERED = 2**16  # intervals in one of them: static patterns, rarely those that follow from the data


def attend_forward(x: Operands, life: Lifetimes, time: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend`, both [B, Nq, H, ...] in memory: the layout in which heads merge without a copy."""
    route = find_route(x, life, time)
    if route.segments is not None:
        out, lse = segments_forward(x.q, x.k, x.v, route.segments, x.scale)
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
) -> Gradients:
    """Gradients of `attend` in all its operands, from those of out and, unless None, lse."""
    route = find_route(x, life, time)
    if route.segments is not None:
        dqkv = segments_backward(dout, dlse, x.q, x.k, x.v, out, lse, route.segments, x.scale)
        dq, dk, dv = (heads_last(t) for t in dqkv)
        return Gradients(dq, dk, dv, None, None, None)
    delta = (out.to(x.wide) * dout.to(x.wide)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    grads = Gradients(
        *(empty_heads_last(t, t.shape[-1]) for t in (x.q, x.k, x.v)),
        *(None if t is None else empty_heads_last(t, dtype=x.wide) for t in (x.bias, x.u, x.tau)),
    )
    for part in route.parts:
        tiles_backward(x, part, dout, delta, lse, grads)
    return grads


def empty_heads_last(like: Tensor, *width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [B, heads, n, *width] in the memory layout [B, n, heads, *width]."""
    batch, heads, length = like.shape[:3]
    return like.new_empty(batch, length, heads, *width, dtype=dtype).transpose(1, 2)


def heads_last(x: Tensor) -> Tensor:
    """`x` [B, heads, n, ...] in the memory layout [B, n, heads, ...], copied unless it has it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@dataclass(frozen=True)
class Route:
    """How one call is computed: by segments of each batch row, or by parts."""

    segments: list[list[Run]] | None
    parts: tuple[Part, ...]


_routes: list[tuple[tuple[object, ...], Tensor, Tensor, Route]] = []


def find_route(x: Operands, life: Lifetimes, time: Tensor | None) -> Route:
    """The route for these shapes and lifetimes, from memory if the very same intervals came lately."""
    (batch, heads, num_queries, _), (kv_heads, num_keys) = x.q.shape, x.k.shape[1:3]
    start, stop = query_intervals(
        life, time, heads=heads, kv_heads=kv_heads, num_queries=num_queries, num_keys=num_keys
    )
    fused = x.bias is None and x.u is None and x.q.device.type == "cpu"
    shapes = (batch, heads, kv_heads, num_queries, start.shape, stop.shape, start.device, fused)
    for known, known_start, known_stop, route in _routes:
        if known == shapes and torch.equal(known_start, start) and torch.equal(known_stop, stop):
            return route
    segments = find_segments(start, stop, num_queries) if fused else None
    parts: tuple[Part, ...] = ()
    if segments is None:
        group = heads // kv_heads
        parts = make_parts(start, stop, batch=batch, kv_heads=kv_heads, group=group, num_queries=num_queries)
    route = Route(segments, parts)
    if start.numel() <= LARGEST_REMEMBERED:
        # Compared by content; start and stop are our own tensors, so nobody changes what is remembered.
        _routes.insert(0, (shapes, start, stop, route))
        del _routes[REMEMBERED:]
    return route
