"""The prefix of codes by the C++ kernels for CPUs.

Legend of shapes: B batch, G key heads, N blocks of L tokens, S codes, Dv width of values.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention.native import library, pointers, sizes, why_not


def takes(v: Tensor) -> bool:
    """Whether the kernels are there, for values in float32 on a CPU."""
    return v.device.type == "cpu" and v.dtype == torch.float32 and why_not("codes") is None


def code_prefix_forward(
    code: Tensor, v: Tensor, goes_on: Tensor, whole: Tensor, count: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills count [B, G, N, S] and mean [B, G, N, S, Dv] behind the first block, from code [B, G, N, L], v [B, G, N, L,
    Dv], and 0 or 1 for each block of `code_prefix`, [B or 1, N]; returns the shares of old and new."""
    code, v = code.to(torch.int32).contiguous(), v.contiguous()
    goes_on, whole = (t.expand(len(code), -1).contiguous() for t in (goes_on, whole))
    old, new = torch.zeros_like(count), torch.zeros_like(count)
    library("codes").code_prefix_forward(_shape(code, mean), *pointers(code, v, goes_on, whole, count, mean, old, new))
    return old, new


def code_prefix_backward(code: Tensor, old: Tensor, new: Tensor, dmean: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of v and of the first block's mean, from that of mean."""
    code, dmean = code.to(torch.int32).contiguous(), dmean.contiguous()
    dv = dmean.new_empty(*code.shape, dmean.shape[-1])
    first = dmean.new_zeros(*dmean.shape[:2], *dmean.shape[3:])
    library("codes").code_prefix_backward(_shape(code, dmean), *pointers(code, old, new, dmean, dv, first))
    return dv, first


def _shape(code: Tensor, mean: Tensor) -> ctypes.Array[ctypes.c_int64]:
    values = sizes(*code.shape, *mean.shape[3:], torch.get_num_threads())
    return (ctypes.c_int64 * len(values))(*values)
