"""Streaming top-k and the thresholds of SPARSEK by the C++ kernels for CPUs, token by token.

Legend of shapes: B batch, H heads, N tokens; R = B H lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.native import library, pointers, sizes, why_not


def takes(score: Tensor) -> bool:
    """Whether the kernels are there, for scores of any type on a CPU."""
    return score.device.type == "cpu" and why_not("select") is None


def streaming_top_k(score: Tensor, time: Tensor, began: Tensor, keep: int, include_first: bool) -> Tensor:
    """death [B, H, N] of `select.streaming_top_k`; score without NaN, time and began int64 [B, H, N]."""
    score, time, began = score.double().contiguous(), time.contiguous(), began.contiguous()
    death = torch.empty_like(time)
    number = score.shape[-1]
    library("select").streaming_top_k(
        *pointers(score, time, began),
        *sizes(score.numel() // max(1, number), number, keep, include_first, torch.get_num_threads()),
        *pointers(death),
    )
    return death


def sparsek_thresholds(u: Tensor, left: Tensor, document: Tensor, keep: int) -> Tensor:
    """tau [B, H, N] in u's type, of finite u [B, H, N]: token j is a candidate until left_j, or its document's end."""
    score, left, document = u.double().contiguous(), left.contiguous(), document.contiguous()
    tau = torch.empty_like(score)
    number = score.shape[-1]
    library("select").sparsek_thresholds(
        *pointers(score, left, document),
        *sizes(score.numel() // max(1, number), number, keep, torch.get_num_threads()),
        *pointers(tau),
    )
    return tau.to(u.dtype)
