"""`local`: every query meets the last `window` tokens, itself included."""

from typing import Any

import torch
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, masked_attention


def cases() -> dict[str, Case]:
    return {
        "gqa": Case({"heads": 6, "kv_heads": 2, "window": 8}),
        "odd window": Case({"heads": 2, "head_dim": 6, "rotary": 100.0, "window": 5}, dim=9),
        "window of one": Case({"heads": 2, "window": 1}, dim=8),
        "mqa without rotary": Case({"heads": 3, "kv_heads": 1, "head_dim": 5, "rotary": 0.0, "window": 16}, dim=7),
    }


def allowed(i: int, j: int, window: int) -> bool:
    return 0 <= i - j < window


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    length, window = x.shape[1], mixer.config.window
    mask = [[allowed(i, j, window) for j in range(length)] for i in range(length)]
    return masked_attention(mixer, x, torch.tensor(mask))


def pairs(mixer: Any, length: int) -> int:
    window = mixer.config.window
    return mixer.config.heads * sum(allowed(i, j, window) for i in range(length) for j in range(length))


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "kv_heads": 2, "window": length}
