"""Vector quantisation: the code of a key, and what earlier blocks hold for each code, as a count and a mean value.

Source: Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization" (2023, arXiv 2309.16354), sections
3.2 and 3.4; the straight-through gradient is that of van den Oord et al. (2017, arXiv 1711.00937).

Legend of shapes: B batch, G key heads, T tokens, N blocks of L tokens, S codes, D width of keys, Dv of values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.ops import codes_native

AT_ONCE = 256  # tokens summed in one product: their table of S codes each stays small
DISTANCES = 2**17  # held at a time: 512 KiB of float32


@torch.no_grad()
def vq_assign(k: Tensor, codebook: Tensor) -> Tensor:
    """The number int32 [B, G, T] of the code nearest to each key, argmin_s |k - C_s|^2, the lowest of equals.

    k [B, G, T, D], codebook [G, S, D]. Distances are at least float32, also under autocast: a rounded one would choose
    another code in decoding than in training. No gradient.
    """
    wide = _wide(torch.promote_types(k.dtype, codebook.dtype))
    k, codebook = k.to(wide), codebook.to(wide)
    if codes_native.takes(k):
        return codes_native.nearest_code(k, codebook)
    nearest = torch.empty(k.shape[:3], dtype=torch.int32, device=k.device)
    at_once = max(1, DISTANCES // max(1, k.shape[0] * codebook.shape[0] * codebook.shape[1]))
    with torch.autocast(k.device.type, enabled=False):
        half_norm = codebook.square().sum(-1)[:, None] / 2
        for first in range(0, k.shape[2], at_once):
            here = slice(first, first + at_once)
            # (|k|^2 - |k - C|^2) / 2, of the same order as the distances turned round
            nearness = (k[:, :, here] @ codebook.mT).sub_(half_norm)
            nearest[:, :, here] = nearness.argmax(-1)  # of equals torch gives the first
    return nearest


def look_up(codebook: Tensor, code: Tensor) -> Tensor:
    """The vectors [B, G, T, D] of the codes [B, G, T], from the codebook [G, S, D]."""
    head = torch.arange(codebook.shape[0], device=code.device)[:, None]
    return codebook[head, code]


def straight_through(x: Tensor, quantised: Tensor) -> Tensor:
    """`quantised`, whose gradient goes to x: quantised + x - sg(x), without rounding."""
    return _StraightThrough.apply(x, quantised)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantised: Tensor) -> Tensor:
        return quantised.view_as(quantised)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def code_sums(code: Tensor, x: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many of the tokens have each code, [..., S], and the sums of their vectors, [..., S, D].

    code int [..., T], x [..., T, D]; both in x's type. A product, not a scattered sum: its order is fixed on every
    device. (The C++ kernel adds token by token.)
    """
    if codes_native.takes(x):
        return codes_native.code_sums(code, x, codes)
    member = x.new_zeros(*code.shape, codes).scatter_(-1, code[..., None].long(), 1.0)
    return member.sum(-2), member.mT @ x


def code_totals(code: Tensor, v: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many tokens have each code, [B, G, S], and their mean value [B, G, S, Dv], 0 where there is none.

    code int [B, G, T], and v [B, G, T, Dv]; who has the code S counts for nothing. Both in at least float32; linear in
    v, with its gradient.
    """
    return _CodeTotals.apply(code, v, codes)


class _CodeTotals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, code: Tensor, v: Tensor, codes: int) -> tuple[Tensor, Tensor]:
        count = v.new_zeros(*code.shape[:2], codes + 1, dtype=_wide(v.dtype))
        mean = count.new_zeros(*count.shape, v.shape[-1])
        with torch.autocast(v.device.type, enabled=False):
            for here, theirs in zip(code.split(AT_ONCE, 2), v.split(AT_ONCE, 2), strict=True):
                number, total = code_sums(here, theirs.to(mean.dtype), codes + 1)
                count += number
                mean += (total - number[..., None] * mean) / count.clamp(min=1)[..., None]
        share = count[..., :codes].clamp(min=1).reciprocal()
        ctx.save_for_backward(code, share)
        ctx.dtype = v.dtype
        count, mean = count[..., :codes].clone(), mean[..., :codes, :].clone()
        ctx.mark_non_differentiable(count)
        return count, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dcount: Tensor, dmean: Tensor) -> tuple[None, Tensor, None]:
        code, share = ctx.saved_tensors
        of_code = F.pad(share[..., None] * dmean, (0, 0, 0, 1))  # behind the codes one of nobody, without gradient
        dv = of_code.gather(2, code[..., None].long().expand(*code.shape, dmean.shape[-1]))
        return None, dv.to(ctx.dtype), None


def code_prefix(
    code: Tensor,
    v: Tensor,
    codes: int,
    *,
    fresh: Tensor,
    whole: Tensor,
    carry: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """For each block what the blocks of its document before it hold of each code: number and mean value of the tokens.

    code    int [B, G, N, L] and v [B, G, N, L, Dv], of the tokens of each block
    fresh   bool [B or 1, N]: the block is the first of its document
    whole   bool [B or 1, N]: others count for nothing
    carry   (count, mean) before block 0, if it is not fresh

    Returns count [B, G, N, S], and mean [B, G, N, S, Dv], 0 for codes that nobody has, both in at least float32. Linear
    in v and the carried mean, with their gradients. A recurrence of weighted means: sums would grow without end, and
    lose what they are made of.
    """
    return _CodePrefix.apply(code, v, codes, fresh, whole, *((None, None) if carry is None else carry))


class _CodePrefix(torch.autograd.Function):
    """With c_i, s_i the count and sum of block i: mean_(i+1) = old_i mean_i + new_i s_i, where old_i is the share of
    the earlier tokens, new_i that of one token of the block, and both are 0 if block i + 1 is fresh."""

    @staticmethod
    def forward(
        ctx: Any,
        code: Tensor,
        v: Tensor,
        codes: int,
        fresh: Tensor,
        whole: Tensor,
        carried_count: Tensor | None,
        carried_mean: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(v.dtype)
        count = v.new_zeros(*code.shape[:3], codes, dtype=wide)
        mean = v.new_empty(*count.shape, v.shape[-1], dtype=wide)
        goes_on, whole = (x.to(wide) for x in (~fresh, whole))
        if code.shape[2]:
            if carried_count is None or carried_mean is None:
                mean[:, :, 0] = 0
            else:
                count[:, :, 0] = carried_count * goes_on[:, None, :1]
                mean[:, :, 0] = carried_mean * goes_on[:, None, :1, None]
        fill = codes_native.code_prefix_forward if codes_native.takes(v) else _prefix_forward
        old, new = fill(code, v, goes_on, whole, count, mean)
        ctx.save_for_backward(code, old, new, goes_on)
        ctx.dtype = v.dtype
        ctx.carried = None if carried_mean is None else (carried_mean.shape, carried_mean.dtype)
        ctx.mark_non_differentiable(count)
        return count, mean

    @staticmethod
    def backward(ctx: Any, dcount: Tensor, dmean: Tensor) -> tuple[Tensor | None, ...]:
        code, old, new, goes_on = ctx.saved_tensors
        back = codes_native.code_prefix_backward if codes_native.takes(dmean) else _prefix_backward
        dv, first = back(code, old, new, dmean)
        dcarry = None
        if ctx.carried is not None:
            shape, dtype = ctx.carried
            dcarry = dmean.new_zeros(shape, dtype=dtype)
            if code.shape[2]:
                dcarry += first * goes_on[:, None, :1, None]
        return None, dv.to(ctx.dtype), None, None, None, None, dcarry


def _prefix_forward(
    code: Tensor, v: Tensor, goes_on: Tensor, whole: Tensor, count: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills count [B, G, N, S] and mean [B, G, N, S, Dv] behind the first block; returns the shares of old and new."""
    codes, wide = count.shape[-1], count.dtype
    old, new = torch.zeros_like(count), torch.zeros_like(count)
    goes_on, whole = (x[:, None, :, None] for x in (goes_on, whole))
    with torch.autocast(v.device.type, enabled=False):
        for i in range(code.shape[2] - 1):
            number_here, sums = code_sums(code[:, :, i], v[:, :, i].to(wide), codes)
            total = count[:, :, i] + number_here * whole[:, :, i]
            share = goes_on[:, :, i + 1] / total.clamp(min=1)
            old[:, :, i], new[:, :, i] = count[:, :, i] * share, whole[:, :, i] * share
            count[:, :, i + 1] = total * goes_on[:, :, i + 1]
            following = mean[:, :, i + 1]
            torch.mul(mean[:, :, i], old[:, :, i, :, None], out=following)
            following.addcmul_(sums, new[:, :, i, :, None])
    return old, new


def _prefix_backward(code: Tensor, old: Tensor, new: Tensor, dmean: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of v and of the first block's mean, from that of mean."""
    number, width = code.shape[2], dmean.shape[-1]
    dv = dmean.new_zeros(*code.shape, width)
    total = dmean[:, :, -1] if number else dmean.new_zeros(*dmean.shape[:2], *dmean.shape[3:])
    for i in reversed(range(number - 1)):  # the gradient of mean_(i+1), also through all that follow
        of_code = new[:, :, i, :, None] * total
        dv[:, :, i] = of_code.gather(2, code[:, :, i, :, None].long().expand(*code.shape[:2], -1, width))
        total = torch.addcmul(dmean[:, :, i], old[:, :, i, :, None], total)
    return dv, total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
