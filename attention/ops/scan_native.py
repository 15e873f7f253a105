"""`diagonal_scan` by the C++ kernels for CPUs: whether they can, and their call.

Legend of shapes: B batch, T tokens, C channels, N numbers that a channel remembers.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.native import MULTIPLE, library, pointers, sizes
from attention.native import why_not as why_none


def why_not(x: Tensor, b: Tensor) -> str | None:
    """What keeps the kernels from taking these inputs and parameters; None: nothing."""
    if x.device.type != "cpu" or (x.dtype, b.dtype) != (torch.float32, torch.float32):
        return f"the C++ kernels take float32 on a CPU, got {x.dtype} with {b.dtype} on {x.device}"
    return why_none("scan")


def scan_forward(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, C] and h [B, C, N], as `scan_torch.scan_forward`."""
    x_, *others = _laid_out(x, log_decay, b, c, h0)
    starts = _bytes(reset)
    y, h = torch.empty_like(x_), torch.empty_like(others[-1])
    library("scan").scan_forward(*pointers(x_, *others, starts), *_sizes(x_, h), *pointers(y, h))
    channels = x.shape[2]
    return y[..., :channels].contiguous(), h[..., :channels].mT.contiguous()


def scan_backward(
    dy: Tensor, dh: Tensor, x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay, b, c and h0, as `scan_torch.scan_backward`."""
    x_, *others = _laid_out(x, log_decay, b, c, h0)
    h0_ = others[-1]
    starts, dy_, dh_ = _bytes(reset), _padded(dy), _padded(dh.mT)
    grads = [torch.empty_like(x_), *(torch.empty_like(h0_) for _ in range(4))]
    library("scan").scan_backward(*pointers(dy_, dh_, x_, *others, starts), *_sizes(x_, h0_), *pointers(*grads))
    dx, dlog_decay, db, dc, dh0 = (t[..., : x.shape[2]] for t in grads)
    dlog_decay, db, dc = (t.sum(0).mT.contiguous() for t in (dlog_decay, db, dc))
    return dx.contiguous(), dlog_decay, db, dc, dh0.mT.contiguous()


def _laid_out(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor) -> list[Tensor]:
    """x [B, T, C], decay, b, c [N, C], h0 [B, N, C], with zeros up to a multiple of channels."""
    return [_padded(t) for t in (x, log_decay.exp().mT, b.mT, c.mT, h0.mT)]


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % MULTIPLE)).contiguous()


def _bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous()


def _sizes(x: Tensor, h: Tensor) -> list[ctypes.c_int64]:
    return sizes(*x.shape, h.shape[1], torch.get_num_threads())
