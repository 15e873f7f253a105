"""`sparse`: the index sets of the paper, as predicates on a query i and a key j, both positions."""

from typing import Any

import torch
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, masked_attention


def cases() -> dict[str, Case]:
    strided = {"pattern": "strided", "rotary": 100.0}
    return {
        "fixed": Case({"heads": 6, "kv_heads": 3, "block": 12, "columns": 5}),
        "fixed, same columns": Case({"heads": 4, "block": 8, "columns": 3, "distinct_columns": False}, dim=16),
        "fixed, one column": Case({"heads": 3, "block": 4, "columns": 1, "head_dim": 5, "rotary": 0.0}, dim=7),
        "fixed heads": Case({"heads": 8, "kv_heads": 4, "block": 7, "columns": 2, "arrangement": "heads"}, dim=16),
        "fixed heads, same columns": Case(
            {"heads": 4, "block": 8, "columns": 4, "arrangement": "heads", "distinct_columns": False}, dim=16
        ),
        "strided": Case({"heads": 4, "kv_heads": 2, "block": 5} | strided, dim=24),
        "strided, long stride": Case({"heads": 2, "block": 16, "head_dim": 6} | strided, dim=9),
        "strided heads": Case({"heads": 4, "kv_heads": 2, "block": 6, "arrangement": "heads"} | strided, dim=16),
    }


def has_pattern(mixer: Any) -> bool:
    return mixer.config.pattern == "fixed"


def near(config: Any, i: int, j: int) -> bool:
    if config.pattern == "strided":
        return i - j < config.block
    return i // config.block == j // config.block


def far(config: Any, head: int, i: int, j: int) -> bool:
    """`head` is a key head."""
    if config.pattern == "strided":
        return (i - j) % config.block == 0
    turn = head % (config.block // config.columns) if config.distinct_columns else 0
    end = config.block - turn * config.columns
    return j % config.block in range(end - config.columns, end)


def meets(config: Any, head: int, i: int, j: int) -> bool:
    kv_heads = config.kv_heads or config.heads
    if j > i:
        return False
    if config.arrangement == "merged":
        return near(config, i, j) or far(config, head, i, j)
    return near(config, i, j) if head < kv_heads // 2 else far(config, head, i, j)


def mask(config: Any, length: int) -> Tensor:
    """[H, T, T]."""
    group = config.heads // (config.kv_heads or config.heads)
    rows = [
        [[meets(config, head // group, i, j) for j in range(length)] for i in range(length)]
        for head in range(config.heads)
    ]
    return torch.tensor(rows)


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    return masked_attention(mixer, x, mask(mixer.config, x.shape[1]))


def pairs(mixer: Any, length: int) -> int:
    return int(mask(mixer.config, length).sum())


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "kv_heads": 3, "block": length, "columns": 2}
