"""`mega`: a moving average token by token, then one softmax over the tokens of the own chunk, then gates."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, rotate, triangle


def cases() -> dict[str, Case]:
    return {
        "chunks": Case({"chunk": 8}),
        "odd chunk, narrow": Case({"query_dim": 2, "value_dim": 5, "ema_dim": 3, "chunk": 5}, dim=7),
        "one number, chunk of one": Case({"value_dim": 3, "ema_dim": 1, "chunk": 1}, dim=5),
        "one chunk": Case({"query_dim": 6, "value_dim": 8, "ema_dim": 2, "chunk": None}, dim=9),
    }


def moving_average(mixer: Any, x: Tensor) -> Tensor:
    """x' [B, T, d]."""
    ema = mixer.ema
    share = 1 / (1 + torch.exp(-ema.alpha))
    decay = 1 - share / (1 + torch.exp(-ema.delta))
    h = torch.zeros(len(x), *decay.shape, dtype=x.dtype)
    out = []
    for t in range(x.shape[1]):
        h = decay * h + share * ema.beta * x[:, t, :, None]
        out.append((ema.gamma * h).sum(-1) / math.sqrt(decay.shape[1]) + ema.omega * x[:, t])
    return F.silu(torch.stack(out, 1))


def bias(mixer: Any, length: int) -> Tensor:
    """[T, T], looked up by where query and key stand in a chunk of their own."""
    chunk = mixer.config.chunk or length
    a, b = (rotate(v.expand(chunk, -1), 10000.0) for v in (mixer.query_bias, mixer.key_bias))
    return (a @ b.T)[[[i % chunk] for i in range(length)], [j % chunk for j in range(length)]]


def mixed(mixer: Any, x: Tensor, ctx: Context, allowed: Tensor) -> Tensor:
    """y where a query meets the keys that `allowed` [T, T] says."""
    d = x.shape[2]
    z, e = len(mixer.query_gain), mixer.value.weight.shape[0]
    base = moving_average(mixer, x) @ mixer.base.weight.T + mixer.base.bias
    update = torch.sigmoid(base[..., :d])
    shared = F.silu(base[..., d : d + z])
    reset = F.silu(base[..., d + z : d + z + e])
    candidate = base[..., d + z + e :]
    v = F.silu(x @ mixer.value.weight.T + mixer.value.bias)
    q = shared * mixer.query_gain + mixer.query_shift
    k = shared * mixer.key_gain + mixer.key_shift
    logits = q @ k.mT / math.sqrt(z) + bias(mixer, x.shape[1])
    out = logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    candidate = F.silu(candidate + (reset * out) @ mixer.output.weight.T + mixer.output.bias)
    return update * (candidate - ctx.residual)


def allowed(mixer: Any, i: int, j: int) -> bool:
    chunk = mixer.config.chunk
    return j <= i and (chunk is None or j // chunk == i // chunk)


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    length = x.shape[1]
    mask = [[allowed(mixer, i, j) for j in range(length)] for i in range(length)]
    return mixed(mixer, x, ctx, torch.tensor(mask))


def pairs(mixer: Any, length: int) -> int:
    return sum(allowed(mixer, i, j) for i in range(length) for j in range(length))


def has_pattern(mixer: Any) -> bool:
    """Keys and values differ in width: no attention that a benchmark could time beside others of equal heads."""
    return False


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"chunk": length}


def dense(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """Attention to all that came before, in one chunk."""
    return mixed(mixer, x, ctx, triangle(x.shape[1]))
