"""The torch path of `attend` as operators of torch: autograd, compile, checkpointing and FLOP counts see one node."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attention.lifetimes import Lifetimes, living_pairs
from attention.ops.attend_tiles import Operands
from attention.ops.attend_torch import attend_backward, attend_forward, empty_heads_last

# A call through a custom operator costs about 12 us without and 60 us with gradients (forward and backward) above
# that of a built-in one: 5 % of the smallest training step we care for (12 sequences of 64 tokens, 4 heads of 32),
# nothing elsewhere. A bare autograd.Function would save half of it, but compile and FLOP counts see through it.


@torch.library.custom_op("attention::attend", mutates_args=())
def attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    time: Tensor | None,
    bias: Tensor | None,
    u: Tensor | None,
    tau: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend`."""
    with torch.autocast(q.device.type, enabled=False):
        return attend_forward(_operands(q, k, v, bias, u, tau, scale), Lifetimes(birth, death), time)


@attend_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    time: Tensor | None,
    bias: Tensor | None,
    u: Tensor | None,
    tau: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return empty_heads_last(q, v.shape[-1]), empty_heads_last(q, dtype=wide)


@torch.library.custom_op("attention::attend_backward", mutates_args=())
def attend_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    time: Tensor | None,
    bias: Tensor | None,
    u: Tensor | None,
    tau: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v and of those of bias, u, tau that are given; bias and u as [B, G, Nk], tau [B, H, Nq]."""
    with torch.autocast(q.device.type, enabled=False):
        x = _operands(q, k, v, bias, u, tau, scale)
        grads = attend_backward(dout, dlse, x, Lifetimes(birth, death), time, out, lse)
    return [t for t in (grads.q, grads.k, grads.v, grads.bias, grads.u, grads.tau) if t is not None]


@attend_backward_op.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    birth: Tensor,
    death: Tensor,
    time: Tensor | None,
    bias: Tensor | None,
    u: Tensor | None,
    tau: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> list[Tensor]:
    grads = [empty_heads_last(t, t.shape[-1]) for t in (q, k, v)]
    owners = (t for t, given in ((k, bias), (k, u), (q, tau)) if given is not None)
    return grads + [empty_heads_last(t, dtype=lse.dtype) for t in owners]


def _operands(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, u: Tensor | None, tau: Tensor | None, scale: float
) -> Operands:
    keys, queries = k.shape[:3], q.shape[:3]
    bias, u = (None if t is None else t.expand(keys) for t in (bias, u))
    return Operands(q, k, v, bias, u, None if tau is None else tau.expand(queries), scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, birth, death, time, bias, u, tau, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, *rest = attend_backward_op(dout, dlse, q, k, v, birth, death, time, bias, u, tau, out, lse, ctx.scale)
    dbias, du, dtau = (None if t is None else rest.pop(0).sum_to_size(t.shape) for t in (bias, u, tau))
    return dq, dk, dv, None, None, None, dbias, du, dtau, None


attend_op.register_autograd(_backward, setup_context=_save)


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
    q: Tensor, k: Tensor, v: Tensor, birth: Tensor, death: Tensor, time: Tensor | None, *args: Any, **kwargs: Any
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
    time: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five products per living pair (logits, dq, dk; dv, d weights), the weights being recomputed."""
    return 2 * (3 * q.shape[-1] + 2 * v.shape[-1]) * _pairs(q, k, birth, death, time)
