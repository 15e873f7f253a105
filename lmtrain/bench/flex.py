"""The peer on a GPU: FlexAttention with the predicate of the lifetimes, birth <= t < death."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attention.lifetimes import Lifetimes
from lmtrain.bench.measure import now

COMPILED = 256  # shapes at most: beyond torch's own limit of 8 it would go on uncompiled, many times slower


def flex_call(
    life: Lifetimes, length: int, heads: int, kv_heads: int, *, compile: bool = True
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], float]:
    """FlexAttention over keys with these lifetimes, and the seconds that its block mask took.

    q [B, heads, length, D]; k, v [B, kv_heads, Nk, D]; out as q. Mask and attention are compiled at their first
    call, for each shape; the seconds are those of a second mask. `compile=False`: neither is, and what they
    compute has length x Nk elements.
    """
    torch._dynamo.config.recompile_limit = COMPILED
    make_mask = torch.compile(create_block_mask, disable=not compile)
    attention = torch.compile(flex_attention, fullgraph=True, dynamic=False, disable=not compile)
    birth, death = (x.expand(kv_heads, -1).contiguous() for x in (life.birth, life.death))
    group = heads // kv_heads

    def lives(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (birth[head // group, key] <= query) & (query < death[head // group, key])

    def mask() -> BlockMask:
        return make_mask(lives, None, heads, length, birth.shape[-1], device=str(birth.device))

    mask()
    begin = now(birth.device)
    block_mask = mask()
    seconds = now(birth.device) - begin

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, block_mask=block_mask, enable_gqa=group > 1)
        assert isinstance(out, Tensor)
        return out

    return call, seconds
