"""`moh`: all heads are computed, and each output is multiplied by the gate that its token gives it."""

import math
from typing import Any

import torch
from torch import Tensor

from attention.mixer import Context, Mixer
from tests.conformance.oracle import Case, projections, triangle

ROUNDING = 1e-13  # a later token lengthens the lists in which the products of earlier ones are computed


def cases() -> dict[str, Case]:
    return {
        "moh": Case({"heads": 6, "kv_heads": 3, "shared_heads": 2, "active_heads": 2}),
        "a group of both kinds": Case({"heads": 6, "kv_heads": 2, "shared_heads": 1, "active_heads": 3}, dim=12),
        "one shared head of four": Case({"heads": 4, "kv_heads": 1, "shared_heads": 1, "active_heads": 1}, dim=16),
        "all routed, gates of the paper": Case(
            {"heads": 5, "head_dim": 6, "shared_heads": 0, "active_heads": 2, "rescale": False, "rotary": 100.0}, dim=9
        ),
        "gates of the paper": Case(
            {"heads": 4, "head_dim": 5, "shared_heads": 2, "active_heads": 1, "rescale": False, "rotary": 0.0}, dim=7
        ),
        "all chosen": Case({"heads": 4, "shared_heads": 1, "active_heads": 3}, dim=8),
        "none chosen": Case({"heads": 6, "kv_heads": 3, "shared_heads": 3, "active_heads": 0}, dim=12),
        "all shared": Case({"heads": 2, "shared_heads": 2, "active_heads": 0}, dim=8),
    }


def has_pattern(mixer: Any) -> bool:
    return False


def softmax(logits: list[Tensor]) -> list[Tensor]:
    total = sum(torch.exp(z) for z in logits)
    return [torch.exp(z) / total for z in logits]


def gates(mixer: Any, token: Tensor) -> list[Tensor]:
    """Of one token [d], for every head."""
    config = mixer.config
    shared, active, routed = config.shared_heads, config.active_heads, config.heads - config.shared_heads
    logits = [row @ token for row in mixer.router.weight]
    p = softmax([logits.pop(0) for _ in range(routed)]) if active else []
    s = softmax([logits.pop(0) for _ in range(shared)]) if shared else []
    of_shared, of_routed = softmax(logits) if active and shared else (1.0, 1.0)
    chosen = sorted(range(len(p)), key=lambda i: (-float(p[i].detach()), i))[:active]
    if config.rescale:
        both = 2 if active and shared else 1
        s = [shared * gate for gate in s]
        p = [active * gate / sum(p[i] for i in chosen) for gate in p]
        of_shared, of_routed = both * of_shared, both * of_routed
    found = [of_shared * gate for gate in s]
    nothing = torch.zeros((), dtype=token.dtype)
    return found + [of_routed * p[i] if i in chosen else nothing for i in range(routed)]


def gate_matrix(mixer: Any, x: Tensor) -> Tensor:
    """[B, H, T, 1]."""
    by_token = torch.stack([torch.stack([torch.stack(gates(mixer, token)) for token in row]) for row in x])
    return by_token.transpose(1, 2)[..., None]


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    q, k, v = projections(mixer, x)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    out = logits.masked_fill(~triangle(x.shape[1]), -torch.inf).softmax(-1) @ v
    return (out * gate_matrix(mixer, x)).transpose(1, 2).flatten(2) @ mixer.output.weight.T


def pairs(mixer: Any, length: int) -> int:
    serving = mixer.config.shared_heads + mixer.config.active_heads
    return serving * sum(1 for i in range(length) for j in range(length) if j <= i)


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "kv_heads": 3, "shared_heads": 2, "active_heads": 4}


def to_dense_limit(mixer: Mixer) -> None:
    torch.nn.init.zeros_(mixer.router.weight)
