"""`attend`, the one attention operation: softmax attention over keys with lifetimes.

Legend of shapes: B batch, H query heads, G key heads, r = H / G (head h reads group h // r), Nq queries, Nk keys,
D width of queries and keys, Dv width of values.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.lifetimes import Lifetimes
from attention.ops.attend_op import PATHS, attend_op, union_op, why_not

DEBUG = os.environ.get("LMTRAIN_DEBUG") == "1"
"""Check on every device what only the data can tell, at the price of waiting for it. On a CPU it always is checked."""

IMPLEMENTATIONS = ("reference", *PATHS)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    life: Lifetimes,
    *,
    time: Tensor | None = None,
    key_bias: Tensor | None = None,
    gate: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax average of the values of the keys alive at each query's time, and the log of its normaliser.

    q [B, H, Nq, D], sorted by time; k [B, G, Nk, D]; v [B, G, Nk, Dv]; one floating type.
    life       birth and death int32, broadcastable to [B, G, Nk]
    time       int32, ascending, broadcastable to [B, H, Nq]; default 0..Nq-1. At FOREVER a query meets nobody.
    key_bias   float32 (float64 if q is), broadcastable to [B, G, Nk]: added to the scaled logit; nobody meets a
               key with -inf
    gate       (u, tau), float32 (float64 if q is), broadcastable to [B, G, Nk] and [B, H, Nq]: the weight of a
               pair is c exp(logit) with c = clip(u - tau, 0, 1), in numerator and normaliser (SPARSEK, arXiv
               2406.16747). tau may be -inf (c = 1).
    scale      of the logits, default D^-1/2
    implementation   "torch"; "triton" (kernels for CUDA devices); "native" (kernels for CPUs, in C++);
               "reference" (quadratic memory: for tests). Default: the kernels of the device where they can take
               the operands and there is more than a token or two to decode, else torch

    Returns out [B, H, Nq, Dv] in q's type, and lse [B, H, Nq], natural log, float32 (float64 if q is). A query
    that meets nobody gets out = 0, lse = -inf and zero gradients. Differentiable in q, k, v, key_bias, u and tau,
    also through lse, so that `merge` of disjoint key sets is exact. Raises ValueError naming the argument that
    does not fit.
    """
    _check(q, k, v, life, time, key_bias, gate, implementation)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if implementation == "reference":
        return attend_reference(q, k, v, life, time=time, key_bias=key_bias, gate=gate, scale=scale)
    u, tau = (None, None) if gate is None else gate
    path = implementation or ""
    return attend_op(q, k, v, life.birth, life.death, life.generation, time, key_bias, u, tau, float(scale), path)


@dataclass(frozen=True)
class KeySet:
    """Keys with lifetimes, and the queries that ask them: q, k, v, life, key_bias, gate of `attend`. Sets may differ in
    D.

    columns    more columns of q and k, as two tensors, [B, H, Nq, F] and one broadcastable to [B, G, Nk, F]. So sets
               may share the other columns; and where those of the keys are constants, nobody computes their gradient
    """

    q: Tensor
    k: Tensor
    v: Tensor
    life: Lifetimes
    key_bias: Tensor | None = None
    gate: tuple[Tensor, Tensor] | None = None
    columns: tuple[Tensor, Tensor] | None = None


def attend_union(
    sets: Sequence[KeySet], *, time: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One softmax over disjoint sets of keys: (out, lse) of their `merge`, by a shorter way back.

    time, scale as in `attend`, of all sets alike. For kinds of keys that one call would serve badly: another width,
    another order, a gate. Where a tau is NaN, so are out and lse. Raises ValueError for no sets, and as `attend`.
    """
    if not sets:
        raise ValueError("sets: expected at least one set of keys, got none")
    for one in sets:
        _check(one.q, one.k, one.v, one.life, time, one.key_bias, one.gate, None)
        if one.columns is not None:
            _check_columns(one, *one.columns)
    if scale is None:
        columns = sets[0].columns
        scale = (sets[0].q.shape[-1] + (0 if columns is None else columns[0].shape[-1])) ** -0.5
    tensors = [
        (
            *(one.q, one.k, one.v, one.life.birth, one.life.death, one.life.generation, time, one.key_bias),
            *(one.gate or (None, None)),
            *(one.columns or (None, None)),
        )
        for one in sets
    ]
    return union_op(tensors, float(scale))


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    life: Lifetimes,
    *,
    time: Tensor | None = None,
    key_bias: Tensor | None = None,
    gate: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `attend`, by a dense mask: Nq x Nk memory, any floating type, ordinary autograd."""
    (B, H, Nq, D), (G, Nk) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = D**-0.5 if scale is None else scale

    def per_head(x: Tensor) -> Tensor:
        """[B, G, Nk] or broadcastable -> [B, H, 1, Nk]."""
        return x.expand(B, G, Nk).repeat_interleave(H // G, 1).unsqueeze(2)

    if time is None:
        time = torch.arange(Nq, dtype=torch.int32, device=q.device)
    now = time.expand(B, H, Nq)[..., None]
    alive = (per_head(life.birth) <= now) & (now < per_head(life.death))
    keys, values = (x.to(wide).repeat_interleave(H // G, 1) for x in (k, v))
    logits = scale * (q.to(wide) @ keys.transpose(-1, -2))
    if key_bias is not None:
        bias = per_head(key_bias)
        alive = alive & (bias > -torch.inf)
        logits = logits + bias.masked_fill(bias == -torch.inf, 0.0)
    share = None
    if gate is not None:
        share = _share(per_head(gate[0]), gate[1].expand(B, H, Nq)[..., None])
        alive = alive & (share > 0)
    logits = logits.masked_fill(~alive, -torch.inf)
    top = logits.detach().amax(-1, keepdim=True) if Nk else logits.new_zeros(B, H, Nq, 1)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(logits - top)
    if share is not None:
        weights = torch.where(alive, weights * share, 0.0)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = (weights / total) @ values
    lse = (total.log() + top).masked_fill(empty, -torch.inf).squeeze(-1)
    return out.to(q.dtype), lse


def _share(u: Tensor, tau: Tensor) -> Tensor:
    """c = clip(u - tau, 0, 1), broadcast; 1 where tau is -inf, whatever u."""
    largest = torch.finfo(u.dtype).max
    above = u.clamp(-largest, largest) - tau
    # Not clamp: its gradient does not vanish at the ends of the interval.
    return torch.where(above >= 1, 1.0, torch.where(above > 0, above, 0.0))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    life: Lifetimes,
    time: Tensor | None,
    key_bias: Tensor | None,
    gate: tuple[Tensor, Tensor] | None,
    implementation: str | None,
) -> None:
    """Everything that can be checked without looking at the data."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation: expected None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected [batch, heads, items, width], got shape {tuple(x.shape)}")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(f"{name}: expected one floating type for q, k, v, got {x.dtype} (q {q.dtype})")
    (B, H, Nq, D), (G, Nk) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k: expected shape [{B}, kv_heads, keys, {D}] as q's, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected shape [{B}, {G}, {Nk}, width] as k's, got {tuple(v.shape)}")
    if G == 0 or H % G:
        raise ValueError(f"q: expected heads in a multiple of the {G} key heads, got {H}")
    keys, queries = (B, G, Nk), (B, H, Nq)
    floating = torch.float64 if q.dtype == torch.float64 else torch.float32
    _check_one("k", k, k.shape, k.dtype, q.device)
    _check_one("v", v, v.shape, v.dtype, q.device)
    _check_one("life.birth", life.birth, keys, torch.int32, q.device)
    _check_one("life.death", life.death, keys, torch.int32, q.device)
    if life.generation is not None:
        _check_one("life.generation", life.generation, keys, torch.int32, q.device)
    if time is not None:
        _check_one("time", time, queries, torch.int32, q.device)
    if key_bias is not None:
        _check_one("key_bias", key_bias, keys, floating, q.device)
    if gate is not None:
        _check_one("gate[0] (u)", gate[0], keys, floating, q.device)
        _check_one("gate[1] (tau)", gate[1], queries, floating, q.device)
    if implementation in PATHS:
        reason = why_not(implementation, q, v)
        if reason is not None:
            raise ValueError(f"implementation: {reason}")
    if time is not None and _may_look(time) and not bool((time[..., 1:] >= time[..., :-1]).all()):
        raise ValueError("time: expected ascending times along the queries, got some that fall")


def _check_columns(one: KeySet, of_q: Tensor, of_k: Tensor) -> None:
    (B, H, Nq, _), (G, Nk) = one.q.shape, one.k.shape[1:3]
    if of_q.shape[:-1] != (B, H, Nq):
        raise ValueError(f"columns[0]: expected shape [{B}, {H}, {Nq}, width] as q's, got {tuple(of_q.shape)}")
    _check_one("columns[0]", of_q, of_q.shape, one.q.dtype, one.q.device)
    _check_one("columns[1]", of_k, (B, G, Nk, of_q.shape[-1]), one.q.dtype, one.q.device)


def _may_look(x: Tensor) -> bool:
    """Whether a check may read numbers: not while a graph is traced, nor where it would wait for the device."""
    return (DEBUG or x.device.type == "cpu") and not torch.compiler.is_compiling()


def _check_one(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if x.dtype != dtype:
        raise ValueError(f"{name}: expected type {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device} as q's, got {x.device}")
    if x.dim() > len(shape) or any(a not in (1, b) for a, b in zip(reversed(x.shape), reversed(shape))):
        raise ValueError(f"{name}: expected a shape broadcastable to {tuple(shape)}, got {tuple(x.shape)}")
