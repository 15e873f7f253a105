"""`sparsek`: at each token every key head sorts the older scores, finds the threshold by bisection, and gates."""

import math
from typing import Any

import torch
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, projections

SELECTS = True
BOUND = True


def cases() -> dict[str, Case]:
    return {
        "gqa": Case({"heads": 6, "kv_heads": 2, "keep": 4, "window": 5}),
        "no window": Case({"heads": 2, "head_dim": 6, "rotary": 100.0, "keep": 3, "window": 0}, dim=9),
        "keep one of all": Case({"heads": 2, "keep": 1, "candidates": 500, "window": 3, "score_scale": 0.5}, dim=8),
        "hard": Case({"heads": 4, "kv_heads": 2, "keep": 5, "candidates": 5, "window": 4}, dim=16),
        "mqa without rotary": Case(
            {"heads": 3, "kv_heads": 1, "head_dim": 5, "rotary": 0.0, "keep": 7, "candidates": 40, "window": 1}, dim=7
        ),
        "recent ones": Case({"heads": 2, "keep": 6, "candidates": 9, "window": 2, "slope": 0.1}, dim=8),
        "so alike that candidates bind": Case({"heads": 2, "keep": 4, "window": 16, "score_scale": 0.02}, dim=8),
    }


def most(config: Any) -> int:
    """How many candidates there are at most."""
    return 2 * config.keep if config.candidates is None else config.candidates


def candidates_at(config: Any, scores: list[float], t: int) -> list[int]:
    """Who takes part at t, the best first, of equal ones the newest."""
    older = range(t - config.window + 1)
    return sorted(older, key=lambda j: (scores[j], j), reverse=True)[: most(config)]


def threshold(keep: int, scores: list[float]) -> float:
    """tau for scores given from the best to the least, to 1e-15 of their size: the clipped sum falls with tau."""
    if len(scores) <= keep:
        return -math.inf
    if scores[keep - 1] - scores[keep] >= 1:
        return (scores[keep - 1] - 1 + scores[keep]) / 2
    low, high = scores[-1] - 1, scores[0]
    for _ in range(80):
        middle = (low + high) / 2
        if sum(min(max(s - middle, 0.0), 1.0) for s in scores) > keep:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def shares(config: Any, u: Tensor) -> Tensor:
    """c [T, T] of one key head's scores u [T]: 1 in the window; older ones by the threshold, whose gradient is that of
    (sum of those between 0 and 1 + the number of those at 1 - keep) / the number of those between."""
    length, scores = len(u), u.tolist()
    rows = []
    for t in range(length):
        there = candidates_at(config, scores, t)
        known = threshold(config.keep, [scores[j] for j in there])
        between = [j for j in there if 0 < scores[j] - known < 1]
        full = sum(scores[j] - known >= 1 for j in there)
        tau = u.new_tensor(known)
        if between and known > -math.inf:
            tau = (sum(u[j] for j in between) + full - config.keep) / len(between)
        row = [u.new_tensor(float(0 <= t - j < config.window)) for j in range(length)]
        for j in there:
            row[j] = u[j] - tau if j in between else u.new_tensor(float(scores[j] > known))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def scores(mixer: Any, x: Tensor) -> Tensor:
    """u [B, G, T]."""
    position = torch.arange(x.shape[1], dtype=x.dtype)
    return mixer.config.score_scale * (x @ mixer.router.weight.T).transpose(1, 2) + mixer.config.slope * position


def gates(mixer: Any, x: Tensor) -> Tensor:
    """c [B, H, T, T]."""
    u = scores(mixer, x)
    c = torch.stack([torch.stack([shares(mixer.config, head) for head in row]) for row in u])
    return c.repeat_interleave(mixer.config.heads // u.shape[1], 1)


def gated(mixer: Any, x: Tensor, c: Tensor) -> Tensor:
    """y of attention with the weights c e^s, c [B, H, T, T]."""
    q, k, v = projections(mixer, x)
    weights = c * torch.exp(q @ k.mT / math.sqrt(q.shape[-1]))
    out = weights @ v / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).flatten(2) @ mixer.output.weight.T


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    return gated(mixer, x, gates(mixer, x))


def pairs(mixer: Any, length: int) -> int:
    """As many as there can be: all of the window, and all candidates."""
    config, met = mixer.config, 0
    for t in range(length):
        met += sum(t - j < config.window for j in range(t + 1))
        met += len(candidates_at(config, [0.0] * length, t))
    return config.heads * met


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "kv_heads": 2, "keep": length, "window": 0}
