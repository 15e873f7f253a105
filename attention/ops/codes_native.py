"""Codes, sums by code and their prefix by the C++ kernels for CPUs.

Legend of shapes: B batch, G key heads, T tokens, N blocks of L tokens, S codes, D width of keys, Dv of values.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.native import MULTIPLE, library, pointers, sizes, why_not


def takes(v: Tensor) -> bool:
    """Whether the kernels are there, for vectors in float32 on a CPU."""
    return v.device.type == "cpu" and v.dtype == torch.float32 and why_not("codes") is None


def nearest_code(k: Tensor, codebook: Tensor) -> Tensor:
    """`codes.vq_assign` of k [B, G, T, D] and the codebook [G, S, D]."""
    k = k if k.stride(-1) == 1 else k.contiguous()
    missing = -codebook.shape[1] % MULTIPLE
    turned = F.pad(codebook.mT, (0, missing)).contiguous()
    half_norm = F.pad(codebook.square().sum(-1) / 2, (0, missing), value=torch.inf)
    code = torch.empty(k.shape[:3], dtype=torch.int32)
    steps = (ctypes.c_int64 * 3)(*k.stride()[:3])
    counts = sizes(*k.shape, turned.shape[2], torch.get_num_threads())
    at = ctypes.c_void_p(k.data_ptr())  # rows of a larger tensor, perhaps
    library("codes").nearest_code(at, steps, *pointers(turned, half_norm), *counts, *pointers(code))
    return code


def code_sums(code: Tensor, x: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """`codes.code_sums` of code [..., T] and x [..., T, D]."""
    code, x = code.to(torch.int32).contiguous(), x.contiguous()
    count, sums = x.new_zeros(*code.shape[:-1], codes), x.new_zeros(*code.shape[:-1], codes, x.shape[-1])
    tokens = code.shape[-1]
    counts = sizes(code.numel() // max(1, tokens), tokens, codes, x.shape[-1], torch.get_num_threads())
    library("codes").code_sums(*pointers(code, x), *counts, *pointers(count, sums))
    return count, sums


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
