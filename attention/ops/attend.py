"""`attend`, the one attention operation: softmax attention over keys with lifetimes.

Legend of shapes: B batch, H query heads, G key heads, r = H / G (head h reads group h // r), Nq queries, Nk keys,
D width of queries and keys, Dv width of values.
"""

import torch
from torch import Tensor

from attention.lifetimes import Lifetimes

IMPLEMENTATIONS = ("reference", "torch", "triton")


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
    """Each query's softmax average of the values of the keys alive at its time, and the log of its normaliser.

    q [B, H, Nq, D], sorted by time; k [B, G, Nk, D]; v [B, G, Nk, Dv]; one floating type.
    life       birth and death int32, broadcastable to [B, G, Nk]
    time       int32, ascending, broadcastable to [B, H, Nq]; default 0..Nq-1. A query at FOREVER meets nobody.
    key_bias   float32 (float64 with float64 q), broadcastable to [B, G, Nk]: added to the scaled logit; -inf: nobody meets the key
    gate       (u, tau), u broadcastable to [B, G, Nk], tau to [B, H, Nq]: the pair's weight is c exp(logit) with
               c = clip(u - tau, 0, 1), in numerator and normaliser (SPARSEK, arXiv 2406.16747). tau may be -inf (c = 1).
    scale      of the logits, default D^-1/2
    implementation   "torch" (the default everywhere) or "reference" (quadratic memory: for tests)

    Returns out [B, H, Nq, Dv] in q's type and lse [B, H, Nq], natural log, float32 (float64 with float64 q). A query
    that meets nobody gets out = 0, lse = -inf and zero gradients. Differentiable in q, k, v, key_bias, u, tau, also
    through lse, so that `merge` of disjoint key sets is exact. Raises ValueError naming the argument that does not fit.
    """
    _check(q, k, v, life, time, key_bias, gate, implementation)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return attend_reference(q, k, v, life, time=time, key_bias=key_bias, gate=gate, scale=scale)


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

    birth, death = per_head(life.birth), per_head(life.death)
    if time is None:
        time = torch.arange(Nq, dtype=torch.int32, device=q.device)
    now = time.expand(B, H, Nq)[..., None]
    alive = (birth <= now) & (now < death)
    keys, values = (x.to(wide).repeat_interleave(H // G, 1) for x in (k, v))
    logits = scale * (q.to(wide) @ keys.transpose(-1, -2))
    if key_bias is not None:
        bias = per_head(key_bias).to(wide)
        alive = alive & (bias > -torch.inf)
        logits = logits + bias.masked_fill(bias == -torch.inf, 0.0)
    share = None
    if gate is not None:
        share = gate_share(per_head(gate[0]).to(wide), gate[1].to(wide).expand(B, H, Nq)[..., None])
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


def gate_share(u: Tensor, tau: Tensor) -> Tensor:
    """c = clip(u - tau, 0, 1), with a gradient only where 0 < u - tau < 1; 1 where tau is -inf."""
    above = u - tau.masked_fill(tau == -torch.inf, 0.0)
    whole = (above >= 1) | (tau == -torch.inf)
    return torch.where(whole, 1.0, torch.where(above > 0, above, 0.0))


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
    if implementation == "triton":
        raise ValueError("implementation: this version has no Triton kernel yet; use None or 'torch'")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [batch, heads, items, width], got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(
                f"{name}: expected one floating type for q, k and v, got {x.dtype} beside q {q.dtype}"
            )
    (B, H, Nq, D), (G, Nk) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(
            f"k: expected [{B}, kv_heads, num_keys, {D}] beside q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: expected [{B}, {G}, {Nk}, any width] beside k {tuple(k.shape)}, got {tuple(v.shape)}"
        )
    if G == 0 or H % G:
        raise ValueError(f"q: expected a number of heads that is a multiple of the {G} key heads, got {H}")
    keys, queries = (B, G, Nk), (B, H, Nq)
    u, tau = (None, None) if gate is None else gate
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, x, shape, dtype in (
        ("life.birth", life.birth, keys, torch.int32),
        ("life.death", life.death, keys, torch.int32),
        ("time", time, queries, torch.int32),
        ("key_bias", key_bias, keys, wide),
        ("gate u", u, keys, wide),
        ("gate tau", tau, queries, wide),
    ):
        if x is None:
            continue
        if x.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected a tensor on {q.device} as q, got {x.device}")
        fits = x.dim() <= 3 and all(a in (1, b) for a, b in zip(reversed(x.shape), reversed(shape)))
        if not fits:
            raise ValueError(f"{name}: expected a shape broadcastable to {shape}, got {tuple(x.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise ValueError(f"{name}: expected a tensor on {q.device} as q, got {x.device}")
