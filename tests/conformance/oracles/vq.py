"""`vq`: full attention over quantised keys, which two blocks on learn nothing."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, heads


def cases() -> dict[str, Case]:
    return {
        "gqa": Case({"heads": 6, "kv_heads": 2, "codes": 7, "block": 8}),
        "mha, odd sizes": Case(
            {"heads": 3, "head_dim": 5, "value_dim": 7, "codes": 5, "block": 5, "position_features": 4}, dim=9
        ),
        "mqa, more codes than tokens": Case({"heads": 2, "kv_heads": 1, "codes": 80, "block": 16}, dim=8),
        "without positions": Case({"heads": 4, "kv_heads": 2, "codes": 6, "block": 4, "positions": "none"}, dim=8),
        "block of one": Case({"heads": 2, "codes": 3, "block": 1}, dim=8),
        "one code": Case({"heads": 2, "codes": 1, "block": 6}, dim=8),
        "gated": Case({"heads": 1, "head_dim": 6, "codes": 6, "block": 7, "gated": True}, dim=10),
        "gated gqa": Case({"heads": 4, "kv_heads": 2, "codes": 6, "block": 4, "gated": True}, dim=8),
    }


def normed(x: Tensor) -> Tensor:
    width = x.shape[-1]
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) / width**0.25


def nearest(k: Tensor, codebook: Tensor) -> int:
    """The number of the row of codebook [S, D] nearest to k [D], the lowest of equals."""
    distances = [float(((k - code) ** 2).sum()) for code in codebook]
    return distances.index(min(distances))


def vectors(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, D], k [B, G, T, D], v [B, G, T, Dv]."""
    number = mixer.config.kv_heads or mixer.config.heads
    q = normed(heads(x, mixer.query.weight, mixer.config.heads))
    k = normed(heads(x, mixer.key.weight, number))
    v = heads(x, mixer.value.weight, number)
    return q, k, v * torch.sigmoid(v) if mixer.config.gated else v


def quantised(mixer: Any, k: Tensor) -> Tensor:
    """[B, G, T, D]: each key's code, without gradient."""
    means = mixer.codebook.means
    rows = [[[means[g, nearest(t, means[g])] for t in k[b, g]] for g in range(k.shape[1])] for b in range(len(k))]
    return torch.stack([torch.stack([torch.stack(keys) for keys in row]) for row in rows])


def relative_table(features: int, reach: int, length: int) -> Tensor:
    """rho [T, T, 2F]: cosines and sines of w (j - i), 0 beyond the reach."""
    table = torch.zeros(length, length, features, dtype=torch.float64)
    for i in range(length):
        for j in range(max(0, i - reach), i + 1):
            for f in range(features // 2):
                angle = (j - i) * 10000.0 ** (-2 * f / features)
                table[i, j, f], table[i, j, features // 2 + f] = math.cos(angle), math.sin(angle)
    return table


def attention(mixer: Any, q: Tensor, window: Tensor, beyond: Tensor, v: Tensor) -> Tensor:
    """[B, H, T, Dv]: `window` [B, G, T, D] are the keys within two blocks, `beyond` those of older blocks."""
    length, config = q.shape[2], mixer.config
    group = config.heads // v.shape[1]
    out = []
    for h in range(config.heads):
        mine = h // group
        block = [t // config.block for t in range(length)]
        far = torch.tensor([[block[j] <= block[i] - 2 for j in range(length)] for i in range(length)])
        content = q[:, h] + mixer.content_bias[h]
        logits = torch.where(far, content @ beyond[:, mine].mT, content @ window[:, mine].mT)
        if config.positions == "xl":
            rho = relative_table(config.position_features or q.shape[-1], config.block, length)
            logits = logits + torch.einsum(
                "bid,df,ijf->bij", q[:, h] + mixer.position_bias[h], mixer.position_weight[h], rho
            )
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        out.append(logits.masked_fill(ahead, -torch.inf).softmax(-1) @ v[:, mine])
    return torch.stack(out, 1)


def output(mixer: Any, x: Tensor, out: Tensor) -> Tensor:
    merged = out.transpose(1, 2).flatten(2)
    if mixer.config.gated:
        gate = x @ mixer.gate.weight.T
        merged = merged * gate * torch.sigmoid(gate)
    return merged @ mixer.output.weight.T


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    q, k, v = vectors(mixer, x)
    code = quantised(mixer, k.detach())
    return output(mixer, x, attention(mixer, q, code + k - k.detach(), code, v))


def pairs(mixer: Any, length: int) -> int:
    """Tokens of the own block and the one before; and all codes, from the third block on."""
    block, count = mixer.config.block, 0
    for i in range(length):
        count += sum(j // block >= i // block - 1 for j in range(i + 1))
        count += mixer.config.codes if i // block >= 2 else 0
    return mixer.config.heads * count


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "kv_heads": 2, "codes": 9, "block": (length + 1) // 2, "positions": "none"}


def dense(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """torch's own attention over quantised keys."""
    q, k, v = vectors(mixer, x)
    key, value = (t.repeat_interleave(3, 1) for t in (quantised(mixer, k.detach()), v))
    out = F.scaled_dot_product_attention(q + mixer.content_bias, key, value, is_causal=True, scale=1.0)
    return output(mixer, x, out)
