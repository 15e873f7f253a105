"""`inattention`: every query meets the initial states of itself and of everything before it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, heads, rotate, triangle


def cases() -> dict[str, Case]:
    return {
        "alibi, gqa": Case({"heads": 6, "kv_heads": 2}),
        "no positions": Case({"heads": 4, "head_dim": 5, "positions": "none"}, dim=10),
        "rotary": Case({"heads": 3, "kv_heads": 1, "head_dim": 6, "positions": "rotary", "cache": "keys"}, dim=7),
        "alibi, keys": Case({"heads": 4, "cache": "keys"}, dim=8),
        "heads wider than the model": Case({"heads": 3, "head_dim": 12, "rotary": 0.0}, dim=7),
    }


def projections(mixer: Any, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, T, D]: queries of x, keys and values of the initial states."""
    config = mixer.config
    kv_heads = config.kv_heads or config.heads
    width = mixer.output.weight.shape[1] // config.heads
    weights = mixer.qkv.weight.split([config.heads * width, kv_heads * width, kv_heads * width])
    q, k, v = (heads(x, w, n) for x, w, n in zip((x, x0, x0), weights, (config.heads, kv_heads, kv_heads), strict=True))
    if config.positions == "rotary":
        q, k = rotate(q, config.rotary), rotate(k, config.rotary)
    of_head = [head // (config.heads // kv_heads) for head in range(config.heads)]
    return q, k[:, of_head], v[:, of_head]


def distance_penalty(mixer: Any, length: int) -> Tensor:
    """[H, T, T]: minus slope times distance, the slopes a geometric sequence over the key heads that ends at 2^-8."""
    config = mixer.config
    kv_heads = config.kv_heads or config.heads
    if config.positions != "alibi":
        return torch.zeros(config.heads, length, length, dtype=torch.float64)
    ratio = 2 ** (-8 / kv_heads)
    slopes = [ratio ** (head // (config.heads // kv_heads) + 1) for head in range(config.heads)]
    distance = [[i - j for j in range(length)] for i in range(length)]
    return -torch.tensor(slopes, dtype=torch.float64)[:, None, None] * torch.tensor(distance)


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    q, k, v = projections(mixer, x, ctx.initial)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + distance_penalty(mixer, x.shape[1])
    weights = logits.masked_fill(~triangle(x.shape[1]), -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ mixer.output.weight.T


def pairs(mixer: Any, length: int) -> int:
    return mixer.config.heads * sum(1 for i in range(length) for j in range(length) if j <= i)


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "kv_heads": 2, "positions": "none"}


def dense(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """torch's own attention, from x to the initial states."""
    out = F.scaled_dot_product_attention(*projections(mixer, x, ctx.initial), is_causal=True)
    return F.linear(out.transpose(1, 2).flatten(2), mixer.output.weight)
