"""`attend` by the C++ kernels for CPUs: whether they can, and their call. Tokens that live to the end of their segment go
to torch's fused kernel (`attend_segments`), which was made for them.

Legend of shapes: B examples, H query heads, G key heads, r = H / G, Nq queries, Nk keys, D and Dv head widths.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.lifetimes import Lifetimes
from attention.native import library
from attention.native import why_not as why_none
from attention.ops.attend_operands import Gradients, Operands, empty_heads_last, row_terms
from attention.ops.attend_route import Route, find_route
from attention.ops.attend_segments import segments_backward, segments_forward

MULTIPLE = 16  # of head widths: a register of floats on the widest processor
TILE = 64  # queries, as in attend.cpp
TASKS = 64  # over all heads: enough for the threads to share them evenly
SUMS = 16  # backward: what chunks of queries add to the same key is summed apart


def why_not(q: Tensor) -> str | None:
    """What keeps the kernels from taking these queries; None: nothing."""
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return f"the C++ kernels take float32 on a CPU, got {q.dtype} on {q.device}"
    return why_none("attend")


class _Tensor(ctypes.Structure):
    """`Tensor` of attend.cpp: [B, heads, n, ..] with its steps."""

    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("example", "head", "item")]

    @classmethod
    def of(cls, x: Tensor | None) -> _Tensor:
        return cls() if x is None else cls(x.data_ptr(), *x.stride()[:3])


_COUNTS = ("B", "H", "G", "Nq", "Nk", "D", "V", "chunks", "threads", "start_group", "stop_group")
_TENSORS = ("q", "k", "v", "bias", "u", "tau", "start", "stop", "out", "lse")
_GRADIENTS = ("dout", "delta", "dq", "dk", "dv", "dbias", "du", "dtau")


class _Call(ctypes.Structure):
    """`Call` of attend.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("scale", ctypes.c_float),
        *((name, _Tensor) for name in (*_TENSORS, *_GRADIENTS)),
        ("wanted", ctypes.c_int64),
    ]


def attend_forward(x: Operands, life: Lifetimes, time: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend`, as `attend_torch.attend_forward`."""
    route = find_route(x, life, time)
    if route.segments is not None:
        return segments_forward(x, route.segments)
    q, k, v = (_padded(t) for t in (x.q, x.k, x.v))
    out, lse = empty_heads_last(q, v.shape[-1]), empty_heads_last(q, dtype=q.dtype)
    tensors = {"q": q, "k": k, "v": v, "bias": x.bias, "u": x.u, "tau": x.tau, "out": out, "lse": lse}
    _run("attend_forward", tensors, route, x, _chunks(q.shape[2], q.shape[0] * q.shape[1], TASKS))
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
    if route.segments is not None:
        return segments_backward(dout, dlse, x, out, lse, route.segments, fixed)
    delta, lse = row_terms(dout, dlse, out, lse, x.wide)
    q, k, v, dout = (_padded(t) for t in (x.q, x.k, x.v, dout))
    wanted = x.k.shape[-1] - fixed
    chunks = _chunks(q.shape[2], k.shape[0] * k.shape[1], SUMS)

    def zeros(width: int | None) -> Tensor:
        """[B, G, Nk] or [.., Nk, width], heads behind tokens in memory."""
        return empty_heads_last(k, *([] if width is None else [width])).zero_()

    grads = {
        "dq": empty_heads_last(q, q.shape[-1]),
        "dk": zeros(-(-wanted // MULTIPLE) * MULTIPLE),
        "dv": zeros(v.shape[-1]),
        "dbias": zeros(None) if wants_bias and x.bias is not None else None,
        "du": None if x.u is None else zeros(None),
        "dtau": None if x.tau is None else empty_heads_last(q),
    }
    tensors = {
        **{"q": q, "k": k, "v": v, "bias": x.bias, "u": x.u, "tau": x.tau},
        **{"lse": lse, "dout": dout, "delta": delta},
        **grads,
    }
    _run("attend_backward", tensors, route, x, chunks, wanted=grads["dk"].shape[-1])
    dq, dk, dv, *others = grads.values()
    return Gradients(dq[..., : x.q.shape[-1]], dk[..., :wanted], dv[..., : x.v.shape[-1]], *others)


def _run(name: str, tensors: dict[str, Tensor | None], route: Route, x: Operands, chunks: int, wanted: int = 0) -> None:
    """The kernel of that name on these tensors, all widths padded."""
    start, stop = _intervals(route, x)
    call = _Call(
        **dict(zip(_COUNTS, (*_counts(tensors), chunks, torch.get_num_threads(), start.stride(2), stop.stride(2)))),
        scale=x.scale,
        wanted=wanted,
        start=_Tensor.of(start),
        stop=_Tensor.of(stop),
        **{name: _Tensor.of(t) for name, t in tensors.items()},
    )
    getattr(library("attend"), name)(ctypes.byref(call))


def _counts(tensors: dict[str, Tensor | None]) -> tuple[int, ...]:
    """B, H, G, Nq, Nk, D, V."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    assert q is not None and k is not None and v is not None
    return *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]


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


def _chunks(queries: int, rows: int, tasks: int) -> int:
    """Stretches of queries that are computed apart, of each of the rows."""
    return max(1, min(-(-queries // TILE), tasks // max(1, rows)))


def _padded(x: Tensor) -> Tensor:
    """Zero columns up to a multiple of MULTIPLE, and the last axis dense."""
    missing = -x.shape[-1] % MULTIPLE
    if missing:
        return F.pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()
