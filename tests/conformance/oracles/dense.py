"""`dense`: every query meets itself and everything before it."""

from typing import Any

from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, masked_attention, triangle


def cases() -> dict[str, Case]:
    return {
        "gqa": Case({"heads": 6, "kv_heads": 2}),
        "mha": Case({"heads": 4, "head_dim": 6, "rotary": 100.0}, dim=10),
        "mqa without rotary": Case({"heads": 3, "kv_heads": 1, "head_dim": 5, "rotary": 0.0}, dim=7),
    }


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    return masked_attention(mixer, x, triangle(x.shape[1]))


def pairs(mixer: Any, length: int) -> int:
    return mixer.config.heads * sum(1 for i in range(length) for j in range(length) if j <= i)


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "kv_heads": 2}
