"""`s2`: a matrix over pairs of blocks, blown up to tokens, with everything later than the query cut off."""

from typing import Any

import torch
from torch import Tensor

from attention.mixer import Context
from tests.conformance.oracle import Case, masked_attention, triangle


def cases() -> dict[str, Case]:
    """No window holds more than 12 tokens: what follows it shows from the shortest sequences on."""
    return {
        "gqa": Case({"heads": 6, "kv_heads": 3, "block": 4, "local_blocks": 2}),
        "moved, one local block": Case(
            {"heads": 4, "block": 5, "local_blocks": 1, "stride": 3, "offset": 7, "rotary": 100.0}, dim=16
        ),
        "wide steps and a dense head": Case(
            {"heads": 6, "kv_heads": 3, "block": 2, "local_blocks": 3, "stride": 7, "dense_heads": 1}, dim=12
        ),
        "homogeneous": Case({"heads": 4, "block": 3, "local_blocks": 2, "homogeneous": True}, dim=8),
        "blocks of a token, no rotary": Case(
            {"heads": 3, "block": 1, "local_blocks": 4, "head_dim": 5, "rotary": 0.0}, dim=7
        ),
    }


def blocks(config: Any, head: int, number: int) -> Tensor:
    """[number, number]: whether the queries of a block (row) meet the keys of another, for a key head."""
    kv_heads = config.kv_heads or config.heads
    stride = config.stride or kv_heads
    step = max(1, stride // kv_heads)
    head_of_pattern = 0 if config.homogeneous else head

    def meets(row: int, column: int) -> bool:
        in_window = row - column < config.local_blocks
        in_shard = (column + head_of_pattern * step + config.offset) % stride == 0
        return column <= row and (in_window or in_shard or head >= kv_heads - config.dense_heads)

    return torch.tensor([[meets(row, column) for column in range(number)] for row in range(number)])


def mask(config: Any, length: int) -> Tensor:
    """[H, T, T]."""
    group = config.heads // (config.kv_heads or config.heads)
    number = -(-length // config.block)
    ones = torch.ones(config.block, config.block, dtype=torch.uint8)
    whole = [torch.kron(blocks(config, h // group, number).to(torch.uint8), ones) for h in range(config.heads)]
    return torch.stack(whole)[:, :length, :length].bool() & triangle(length)


def definition(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    return masked_attention(mixer, x, mask(mixer.config, x.shape[1]))


def pairs(mixer: Any, length: int) -> int:
    return int(mask(mixer.config, length).sum())


def dense_limit(dim: int, length: int) -> dict[str, Any]:
    return {"heads": 6, "kv_heads": 3, "block": 4, "local_blocks": 2, "dense_heads": 3}
