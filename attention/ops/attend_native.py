"""`attend` by the C++ kernels for CPUs: whether they can, and their call. Where tokens
live to the end of a long segment, torch's fused kernel (`attend_segments`) is a little faster.

Legend of shapes: B examples, H query heads, G key heads, r = H / G, Nq queries, Nk keys, D and Dv head widths.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.lifetimes import Lifetimes
from attention.native import MULTIPLE, library
from attention.native import why_not as why_none
from attention.ops.attend_operands import Gradients, Operands, empty_heads_last
from attention.ops.attend_route import Route, find_route
from attention.ops.attend_segments import segments_backward, segments_forward

TILE = 64  # queries, as in attend.cpp
TASKS = 64  # over all heads: enough for the threads to share them evenly
SUMS = 16  # backward: what chunks of queries add to the same key is summed apart
LONG = 4096  # tokens of a segment
FEW = 3  # queries, to which most of a tile is idle


def why_not(q: Tensor) -> str | None:
    """What keeps the kernels from taking these queries; None: nothing."""
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return f"the C++ kernels take float32 on a CPU, got {q.dtype} on {q.device}"
    return why_none("attend")


def attend_forward(x: Operands, life: Lifetimes, time: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend`, as `attend_torch.attend_forward`."""
    route = find_route(x, life, time)
    if route.segments is not None and route.segments.longest >= LONG:
        return segments_forward(x, route.segments)
    q, k, v = (_padded(t) for t in (x.q, x.k, x.v))
    out, lse = empty_heads_last(q, v.shape[-1]), empty_heads_last(q, dtype=q.dtype)
    _run("attend_forward", route, x, TASKS // max(1, q.shape[0] * q.shape[1]), 0, q, k, v, out, lse, *[None] * 8)
    return out[..., : x.v.shape[-1]], lse


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
    """Gradients of `attend` in all its operands, as `attend_torch.attend_backward`."""
    route = find_route(x, life, time, wants_bias)
    if route.segments is not None and route.segments.longest >= LONG:
        return segments_backward(dout, dlse, x, out, lse, route.segments, fixed)
    q, k, v, out, dout = (_padded(t) for t in (x.q, x.k, x.v, out, dout))
    wanted = x.k.shape[-1] - fixed

    dq = empty_heads_last(q, q.shape[-1])
    dk, dv = (empty_heads_last(k, width) for width in (wanted + -wanted % MULTIPLE, v.shape[-1]))
    dbias, du = (
        None if t is None else empty_heads_last(k, dtype=q.dtype) for t in (x.bias if wants_bias else None, x.u)
    )
    dtau = None if x.tau is None else empty_heads_last(q, dtype=q.dtype)
    grads = (dq, dk, dv, dbias, du, dtau)
    chunks = SUMS // max(1, k.shape[0] * k.shape[1])
    _run("attend_backward", route, x, chunks, dk.shape[-1], q, k, v, out, lse, dout, dlse, *grads)
    return Gradients(dq[..., : x.q.shape[-1]], dk[..., :wanted], dv[..., : x.v.shape[-1]], dbias, du, dtau)


def _run(
    name: str,
    route: Route,
    x: Operands,
    chunks: int,
    wanted: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *more: Tensor | None,
) -> None:
    """The kernel of that name on q, k, v and all `more` tensors of `Given` in attend.cpp, widths padded."""
    tensors = (*_intervals(route, x), q, k, v, x.bias, x.u, x.tau, *more)
    (batch, heads, queries, width), (kv_heads, keys) = q.shape, k.shape[1:3]
    values = [batch, heads, kv_heads, queries, keys, width, v.shape[3], wanted]
    values += [max(1, min(chunks, -(-queries // TILE))), torch.get_num_threads()]
    for t in tensors:
        values += (0, 0, 0, 0) if t is None else (t.data_ptr(), *t.stride()[:3])
    given = (ctypes.c_int64 * len(values))(*values)
    getattr(library("attend"), name)(given, ctypes.c_float(x.scale))


def _intervals(route: Route, x: Operands) -> tuple[Tensor, Tensor]:
    """Query intervals as [B, G, r, Nk], with steps of 0 where lists are alike; of a key with a bias of -inf, none."""
    (batch, heads), (kv_heads, keys) = x.q.shape[:2], x.k.shape[1:3]
    start, stop = route.start, route.stop
    if x.bias is not None:
        never = x.bias == -torch.inf
        if bool(never.any()):
            stop = stop.masked_fill(never[:, :, None], 0)
    shape = (batch, kv_heads, heads // kv_heads, keys)
    return start.contiguous().expand(shape), stop.contiguous().expand(shape)


def _padded(x: Tensor) -> Tensor:
    """Zero columns up to a multiple of MULTIPLE, and the last axis dense."""
    missing = -x.shape[-1] % MULTIPLE
    if missing:
        return F.pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()
