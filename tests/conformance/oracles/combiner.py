"""`combiner`: a query meets tokens one by one, and spans of earlier tokens as one key each.

Everything here is spelled out from position lists: which spans a query has, and what stands for each.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, heads, projections


def cases() -> dict[str, Case]:
    return {
        "fixed": Case({"heads": 6, "kv_heads": 2, "span": 8}),
        "fixed, odd span, bias": Case({"heads": 2, "head_dim": 6, "rotary": 100.0, "span": 5, "span_bias": True}, 9),
        "fixed, span of one": Case({"heads": 2, "span": 1}, dim=8),
        "fixed mqa without rotary": Case({"heads": 3, "kv_heads": 1, "head_dim": 5, "rotary": 0.0, "span": 16}, dim=7),
        "logsparse": Case({"heads": 4, "kv_heads": 2, "pattern": "logsparse"}, dim=16),
        "logsparse, bias": Case(
            {"heads": 2, "head_dim": 5, "rotary": 0.0, "pattern": "logsparse", "span_bias": True}, dim=9
        ),
        "axial": Case({"heads": 3, "pattern": "axial", "span": 8}),
        "axial, odd span, bias": Case(
            {"heads": 2, "head_dim": 5, "rotary": 0.0, "pattern": "axial", "span": 5, "span_bias": True}, dim=7
        ),
    }


def direct(config: Any, i: int) -> list[int]:
    """Tokens that query i meets as themselves."""
    if config.pattern == "logsparse":
        return [i]
    return [j for j in range(i + 1) if j // config.span == i // config.span]


def spans(config: Any, i: int) -> list[list[int]]:
    """Tokens of each span that query i meets through an abstraction."""
    if config.pattern == "logsparse":
        found, end = [], i
        for bit in range(i.bit_length()):
            if (i >> bit) % 2:
                found.append(list(range(end - 2**bit, end)))
                end -= 2**bit
        return found
    return [[b * config.span + c for c in range(config.span)] for b in range(i // config.span)]


def has_pattern(mixer: Any) -> bool:
    return mixer.config.pattern != "axial"


def turn(x: Tensor, base: float, position: int) -> Tensor:
    """x [..., D] rotated as one token at `position`."""
    if not base:
        return x
    half = x.shape[-1] // 2
    angle = torch.tensor([position * base ** (-j / half) for j in range(half)], dtype=torch.float64)
    cos, sin, first, second = angle.cos(), angle.sin(), x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def weighted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax average of v [B, n, D] for q [B, D] and k [B, n, D]."""
    logits = (k @ q[..., None]).squeeze(-1) / math.sqrt(q.shape[-1])
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return (weights[..., None] * v).sum(1)


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    config, group = mixer.config, mixer.config.heads // (mixer.config.kv_heads or mixer.config.heads)
    q, k, v = projections(mixer, x)
    number = config.heads // group
    width = q.shape[-1]
    w_q, w_k, _ = mixer.qkv.weight.split([config.heads * width, number * width, number * width])
    raw_q, raw_k = heads(x, w_q, config.heads), heads(x, w_k, number)
    row_key, row_mean = row_abstractions(mixer, x, q, k, v) if config.pattern == "axial" else (None, None)

    def abstraction(head: int, i: int, span: list[int]) -> tuple[Tensor, Tensor]:
        if row_key is not None and row_mean is not None:
            own = span[i % config.span]
            return row_key[:, head, own], row_mean[:, head, own]
        mine = head // group
        top_q = raw_q[:, mine * group : (mine + 1) * group, span].amax((1, 2))
        top_k = raw_k[:, mine, span].amax(1)
        top_q, top_k = (turn(t, config.rotary, span[-1]) for t in (top_q, top_k))
        return top_k, weighted(top_q, k[:, head, span], v[:, head, span])

    out = torch.zeros_like(q)
    for head in range(config.heads):
        for i in range(x.shape[1]):
            tokens, found = direct(config, i), spans(config, i)
            made = [abstraction(head, i, span) for span in found]
            keys = torch.stack([*(k[:, head, j] for j in tokens), *(key for key, _ in made)], 1)
            values = torch.stack([*(v[:, head, j] for j in tokens), *(value for _, value in made)], 1)
            sizes = [1.0] * len(tokens) + [float(len(span)) if config.span_bias else 1.0 for span in found]
            out[:, head, i] = weighted(q[:, head, i], keys, values, torch.tensor(sizes, dtype=torch.float64).log())
    return out.transpose(1, 2).flatten(2) @ mixer.output.weight.T


def row_abstractions(mixer: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """kbar and vbar [B, H, T, D]: each token attends to its whole row, later tokens included."""
    span = mixer.config.span
    own_row = torch.tensor([[i // span == j // span for j in range(x.shape[1])] for i in range(x.shape[1])])
    logits = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~own_row, -torch.inf)
    mean = logits.softmax(-1) @ v
    inner = x + mean.transpose(1, 2).flatten(2) @ mixer.row_output.weight.T
    normed = F.layer_norm(inner, inner.shape[-1:], mixer.row_norm.weight)
    key = heads(normed, mixer.row_key.weight, mixer.config.heads)
    turned = [turn(key[:, :, t], mixer.config.rotary, t) for t in range(x.shape[1])]
    return torch.stack(turned, 2), mean


def pairs(mixer: Any, length: int) -> int:
    config = mixer.config
    return config.heads * sum(len(direct(config, i)) + len(spans(config, i)) for i in range(length))


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "kv_heads": 2, "span": length}
