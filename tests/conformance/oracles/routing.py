"""`routing`: every token takes its nearest cluster and meets the last `window` tokens that took the same."""

import math
from typing import Any

import torch
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, heads, rotate

SELECTS = True
ROUNDING = 1e-13  # a later token moves the place, in the order of clusters, of those before it


def cases() -> dict[str, Case]:
    return {
        "routing": Case({"heads": 4, "clusters": 4, "window": 8}),
        "many clusters, odd window": Case(
            {"heads": 2, "head_dim": 6, "clusters": 7, "window": 3, "rotary": 100.0}, dim=9
        ),
        "wide window": Case({"heads": 3, "head_dim": 5, "clusters": 2, "window": 16, "rotary": 0.0}, dim=7),
        "one cluster": Case({"heads": 2, "clusters": 1, "window": 5}, dim=8),
        "window of one": Case({"heads": 2, "clusters": 3, "window": 1}, dim=8),
    }


def shared_vectors(mixer: Any, x: Tensor) -> Tensor:
    """[B, H, T, D]: x W_q with mean 0 and variance 1 over each head."""
    c = heads(x, mixer.shared.weight, mixer.config.heads)
    c = c - c.mean(-1, keepdim=True)
    return c / torch.sqrt((c * c).mean(-1, keepdim=True) + 1e-6)


def nearest(c: Tensor, centroids: Tensor) -> int:
    """The number of the row of centroids [C, D] whose product with c [D] is largest, the lowest of equals."""
    products = [float(c @ mu) for mu in centroids]
    return products.index(max(products))


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    c = shared_vectors(mixer, x)
    qk, v = rotate(c, mixer.config.rotary), heads(x, mixer.value.weight, mixer.config.heads)
    rows = []
    for b in range(c.shape[0]):
        for h in range(c.shape[1]):
            cluster = [nearest(token.detach(), mixer.centroids.means[h]) for token in c[b, h]]
            for t in range(c.shape[2]):
                mates = [j for j in range(t + 1) if cluster[j] == cluster[t]][-mixer.config.window :]
                logits = qk[b, h, mates] @ qk[b, h, t] / math.sqrt(c.shape[3])
                rows.append(logits.softmax(0) @ v[b, h, mates])
    out = torch.stack(rows).view(v.shape)
    return out.transpose(1, 2).flatten(2) @ mixer.output.weight.T


def pairs(mixer: Any, length: int) -> float:
    """The expectation where each token takes one of the clusters by a fair die: by the distribution of how many of
    the tokens so far took one of them."""
    config = mixer.config
    distribution, total = [1.0], 0.0
    for _ in range(length):
        total += sum(p * min(1 + mates, config.window) for mates, p in enumerate(distribution))
        stay = [p * (1 - 1 / config.clusters) for p in distribution] + [0.0]
        more = [0.0] + [p / config.clusters for p in distribution]
        distribution = [a + b for a, b in zip(stay, more, strict=True)]
    return config.heads * total


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 4, "clusters": 1, "window": length}


def dense(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """torch's own attention, queries and keys being the same."""
    qk = rotate(shared_vectors(mixer, x), mixer.config.rotary)
    v = heads(x, mixer.value.weight, mixer.config.heads)
    out = torch.nn.functional.scaled_dot_product_attention(qk, qk, v, is_causal=True)
    return out.transpose(1, 2).flatten(2) @ mixer.output.weight.T
