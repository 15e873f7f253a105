"""`mosa`: at each token every head sorts all tokens so far by (score, position) and keeps the best."""

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, rotate, triangle

SELECTS = True
# Later tokens say how long the lists are, and so how many rows a product has: over that, it may regroup its sums.
ROUNDING = 1e-13


def cases() -> dict[str, Case]:
    plain = {"include_first": False}
    return {
        "first kept": Case({"heads": 6, "head_dim": 8, "keep": 7}),
        "best only": Case(
            {"heads": 4, "head_dim": 6, "keep": 5, "rotary": 100.0, "rotary_fraction": 1.0} | plain, dim=16
        ),
        "the first and two more": Case({"heads": 9, "head_dim": 4, "keep": 3}, dim=9),
        "the best one": Case({"heads": 12, "head_dim": 3, "keep": 1, "rotary": 0.0} | plain, dim=16),
        "heads as wide as the model": Case({"heads": 2, "keep": 16, "rotary_fraction": 0.4}, dim=10),
    }


def kept(config: Any, scores: list[float], t: int) -> list[int]:
    """The tokens that a head keeps when it has read tokens 0..t of a document."""
    first = [0] if config.include_first else []
    others = sorted(set(range(t + 1)) - set(first), key=lambda j: (scores[j], j), reverse=True)
    return first + others[: config.keep - len(first)]


def mask(config: Any, scores: Tensor) -> Tensor:
    """[T, T] of one head: query t is active and meets key j. An inactive query meets nobody."""
    length = len(scores)
    met = torch.zeros(length, length, dtype=torch.bool)
    for t in range(length):
        mine = kept(config, scores.tolist(), t)
        if t in mine:
            met[t, mine] = True
    return met


def attention(mixer: Any, x: Tensor, met: Tensor, head: int) -> Tensor:
    """[B, T, d]: what one head adds where its queries meet the keys of `met` [B, T, T]."""
    q, k, v = (x @ mixer.qkv[head]).chunk(3, -1)
    if mixer.config.rotary:
        turned = round(q.shape[-1] * mixer.config.rotary_fraction)
        q, k = (torch.cat([rotate(t[..., :turned], mixer.config.rotary), t[..., turned:]], -1) for t in (q, k))
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    alone = ~met.any(-1, keepdim=True)
    weights = logits.masked_fill(~(met | alone), -torch.inf).softmax(-1).masked_fill(alone, 0.0)
    gate = torch.sigmoid(x @ mixer.router.weight[head])
    return gate[..., None] * (weights @ v) @ mixer.output[head]


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    y = torch.zeros_like(x)
    for head in range(mixer.config.heads):
        scores = (x @ mixer.router.weight[head]).detach()
        y = y + attention(mixer, x, torch.stack([mask(mixer.config, row) for row in scores]), head)
    return y


def pairs(mixer: Any, length: int) -> float:
    """Expected over random orders: is token t among the best so far, and if so, how many are they?"""
    config, expected = mixer.config, Fraction(0)
    for t in range(length):
        best = min(config.keep, t + 1)
        if config.include_first and t:
            active = min(Fraction(1), Fraction(config.keep - 1, t))
        else:
            active = Fraction(best, t + 1)
        expected += active * best
    return float(config.heads * expected)


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "head_dim": 8, "keep": length, "include_first": False}


def dense(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """Full causal attention by torch's own operation, each head times the sigmoid of its router."""
    y = torch.zeros_like(x)
    everyone = triangle(x.shape[1]).expand(len(x), -1, -1)
    for head in range(mixer.config.heads):
        q, k, v = (x @ mixer.qkv[head]).chunk(3, -1)
        half = q.shape[-1] // 2
        q, k = (torch.cat([rotate(t[..., :half], mixer.config.rotary), t[..., half:]], -1) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=everyone)
        y = y + torch.sigmoid(x @ mixer.router.weight[head])[..., None] * out @ mixer.output[head]
    return y
