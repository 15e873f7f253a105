"""`attend` as operators of torch: autograd, compile, checkpointing and FLOP counts see one node."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attention.lifetimes import Lifetimes, living_pairs
from attention.ops import attend_native, attend_torch
from attention.ops.attend_operands import Operands, empty_heads_last
from attention.ops.attend_plan import FEW_QUERIES
from attention.ops.merge import merge

# Registered by hand rather than by `torch.library.custom_op`, which costs 60 us per call and its backward where this
# costs 20: 5 % against 2 % of attention in the smallest training we care for (12 sequences of 64 tokens, 4 heads of
# 32). opcheck, compile and activation checkpointing pass alike.
PATHS = ("torch", "native", "triton")

_library = torch.library.Library("attention", "FRAGMENT")
_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor birth, Tensor death, Tensor? generation, Tensor? time, "
    "Tensor? bias, Tensor? u, Tensor? tau"
)
_library.define(f"attend({_OPERANDS}, float scale, str path) -> (Tensor out, Tensor lse)")
_library.define(
    f"attend_backward(Tensor dout, Tensor? dlse, {_OPERANDS}, Tensor out, Tensor lse, float scale, str path, "
    "bool wants_bias=True, int fixed=0) -> Tensor[]"
)
_forward_op = torch.ops.attention.attend.default
_backward_op = torch.ops.attention.attend_backward.default


def attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    generation: Tensor | None,
    time: Tensor | None,
    bias: Tensor | None,
    u: Tensor | None,
    tau: Tensor | None,
    scale: float,
    path: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend`, as one operator; `path`: one of PATHS, or "" for the fastest."""
    return _forward_op(q, k, v, birth, death, generation, time, bias, u, tau, scale, path)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    generation: Tensor | None,
    time: Tensor | None,
    bias: Tensor | None,
    u: Tensor | None,
    tau: Tensor | None,
    scale: float,
    path: str,
) -> tuple[Tensor, Tensor]:
    with _no_autocast(q):
        x, life = _operands(q, k, v, bias, u, tau, scale), Lifetimes(birth, death, generation)
        return _module(path, q, v).attend_forward(x, life, time)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return empty_heads_last(q, v.shape[-1]), empty_heads_last(q, dtype=wide)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    generation: Tensor | None,
    time: Tensor | None,
    bias: Tensor | None,
    u: Tensor | None,
    tau: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    path: str,
    wants_bias: bool = True,
    fixed: int = 0,
) -> list[Tensor]:
    """Gradients of q, k (without its last `fixed` columns), v, and of those of bias (if wanted), u, tau that are given,
    as [B, G, Nk] and [B, H, Nq]."""
    with _no_autocast(q):
        x, life = _operands(q, k, v, bias, u, tau, scale), Lifetimes(birth, death, generation)
        return _module(path, q, v).attend_backward(dout, dlse, x, life, time, out, lse, wants_bias, fixed).given


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    generation: Tensor | None,
    time: Tensor | None,
    bias: Tensor | None,
    u: Tensor | None,
    tau: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    path: str,
    wants_bias: bool = True,
    fixed: int = 0,
) -> list[Tensor]:
    grads = [empty_heads_last(t, t.shape[-1] - less) for t, less in ((q, 0), (k, fixed), (v, 0))]
    given = ((k, bias if wants_bias else None), (k, u), (q, tau))
    owners = (t for t, operand in given if operand is not None)
    return grads + [empty_heads_last(t, dtype=lse.dtype) for t in owners]


def why_not(path: str, q: Tensor, v: Tensor) -> str | None:
    """What keeps one of PATHS from taking these queries and values; None: nothing."""
    if path == "torch":
        return None
    if path == "native":
        return attend_native.why_not(q)
    try:
        from attention.ops import attend_triton
    except ModuleNotFoundError as error:
        return f"the Triton kernels need the package {error.name}"
    return attend_triton.why_not(q, v)


def _module(path: str, q: Tensor, v: Tensor) -> Any:
    """The module that computes; the Triton kernels' is imported by the first call that takes it, and Triton with it."""
    path = path or _fastest(q, v)
    if path != "triton":
        return attend_native if path == "native" else attend_torch
    from attention.ops import attend_triton

    return attend_triton


def _fastest(q: Tensor, v: Tensor) -> str:
    """The kernels of the device, where they can take the operands; a token or two are decoded by torch."""
    kernels, few = ("triton", FEW_QUERIES) if q.is_cuda else ("native", attend_native.FEW)
    return kernels if q.shape[2] > few and why_not(kernels, q, v) is None else "torch"


def _no_autocast(q: Tensor) -> AbstractContextManager[Any]:
    """Inside, types are chosen here: autocast would round the float32 products."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _operands(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, u: Tensor | None, tau: Tensor | None, scale: float
) -> Operands:
    keys, queries = k.shape[:3], q.shape[:3]
    bias, u = (None if t is None else t.expand(keys) for t in (bias, u))
    return Operands(q, k, v, bias, u, None if tau is None else tau.expand(queries), scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = _forward_op(*args)
        *tensors, ctx.scale, ctx.path = args
        ctx.save_for_backward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dlse = douts
        *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        wants_k, wants_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[7]
        fixed = 0 if wants_k else tensors[1].shape[-1]
        grads = _gradients(dout, dlse, tensors, out, lse, ctx.scale, ctx.path, wants_bias, fixed)
        return *grads, None, None


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    tensors: Sequence[Tensor | None],
    out: Tensor,
    lse: Tensor,
    scale: float,
    path: str,
    wants_bias: bool,
    fixed: int,
) -> list[Any]:
    """Those of the ten tensors of `attend_op`, that of k without its last `fixed` columns: None if none is left."""
    dq, dk, dv, *rest = _backward_op(dout, dlse, *tensors, out, lse, scale, path, wants_bias, fixed)
    optional = (tensors[7] if wants_bias else None, *tensors[8:])  # bias, u, tau
    last = [None if t is None else rest.pop(0).sum_to_size(t.shape) for t in optional]
    return [dq, dk if dk.shape[-1] else None, dv, None, None, None, None, *last]


def union_op(sets: Sequence[tuple[Tensor | None, ...]], scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) over the union of disjoint key sets, each the ten tensors of `attend_op` and then what follows on the
    columns of its q and k, both or none: [B, H, Nq, F] and, broadcastable to it, [B, G, Nk, F]."""
    return _Union.apply(scale, *chain.from_iterable(sets))


class _Union(torch.autograd.Function):
    """The weight of a pair in the union is exp(logit - lse) with the lse of all, and its gradient asks for the output
    of all. So each set's backward pass, given these, is its part of the whole: no gradient passes through a merging."""

    @staticmethod
    def forward(ctx: Any, scale: float, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        sets = list(_in_groups(tensors, 12))
        joined = [_joined(*one) for one in sets]
        out, lse = merge([_one_of_union(one, scale) for one in joined])
        ctx.scale = scale
        ctx.shapes = [(q.shape[-1], None if more is None else more.shape) for q, *_, more in sets]
        ctx.save_for_backward(*chain.from_iterable(joined), out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dlse = douts
        *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        grads: list[Tensor | None] = [None]
        wants = _in_groups(ctx.needs_input_grad[1:], 12)
        for one, wanted, (width, more) in zip(_in_groups(tensors, 10), wants, ctx.shapes, strict=True):
            wants_k, wants_bias, wants_more = wanted[1], wanted[7], wanted[11]
            fixed = 0 if wants_more else one[1].shape[-1] - (width if wants_k else 0)
            dq, dk, *rest = _gradients(dout, dlse, one, out, lse, ctx.scale, "", wants_bias, fixed)
            grads += [dq[..., :width], dk[..., :width] if wants_k else None, *rest]
            grads.append(None if more is None else dq[..., width:])
            grads.append(dk[..., width:].sum_to_size(more) if wants_more else None)
        return tuple(grads)


def _one_of_union(tensors: Sequence[Tensor | None], scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of one set; a tau that is no number must not pass for a share of 0."""
    out, lse = _forward_op(*tensors, scale, "")
    tau = tensors[9]
    return out, lse if tau is None else lse.masked_fill(tau.isnan(), torch.nan)


def _joined(q: Tensor, k: Tensor, *more: Tensor | None) -> tuple[Tensor | None, ...]:
    """The ten tensors of `attend_op`, from the twelve of a set of `union_op`."""
    *others, of_q, of_k = more
    if of_q is not None and of_k is not None:
        q, k = torch.cat([q, of_q], -1), torch.cat([k, of_k.expand(*k.shape[:3], of_q.shape[-1])], -1)
    return q, k, *others


def _in_groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _differentiable(*args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        return _Attend.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*args)


_library.impl("attend", _forward, "CompositeExplicitAutograd")
_library.impl("attend_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attend", _differentiable, "Autograd")
torch.library.register_fake("attention::attend", _fake_forward, lib=_library)
torch.library.register_fake("attention::attend_backward", _fake_backward, lib=_library)


def _pairs(q: Tensor, k: Tensor, birth: Tensor, death: Tensor, time: Tensor | None) -> int:
    (batch, heads, num_queries), (kv_heads, num_keys) = q.shape[:3], k.shape[1:3]
    return living_pairs(
        Lifetimes(birth, death),
        time,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
    )


@register_flop_formula(torch.ops.attention.attend, get_raw=True)
def _forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    generation: Tensor | None,
    time: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Two products per living pair."""
    return 2 * (q.shape[-1] + v.shape[-1]) * _pairs(q, k, birth, death, time)


@register_flop_formula(torch.ops.attention.attend_backward, get_raw=True)
def _backward_flops(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    generation: Tensor | None,
    time: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five products per living pair (logits, dq, dk; dv, d weights), the weights being recomputed."""
    fixed = args[8] if len(args) > 8 else 0
    return 2 * (3 * q.shape[-1] - fixed + 2 * v.shape[-1]) * _pairs(q, k, birth, death, time)
