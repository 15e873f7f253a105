"""S2-Attention: every key head keeps a local window of blocks, and for ever its own shard of all blocks.

Source: Lin et al., "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads" (2024, arXiv 2407.17678), and
its kernels, linxihui/dkernel. The shards of the heads together hold every block, where there are as many heads as
blocks in a stride. Prefer dense layers (a word of the model's pattern) to dense heads: heads of unequal work unbalance
a GPU.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.clock import Clock
from attention.lifetimes import FOREVER
from attention.mixer import register, setting
from attention.softmax import AttentionConfig, TokenAttention


@dataclass
class S2Config(AttentionConfig):
    """Settings of `s2`."""

    block: int = setting(64, "tokens of a block", at_least=1)
    local_blocks: int = setting(8, "blocks of the window, a query's own included", at_least=1)
    stride: int | None = setting(None, "blocks from one of a shard to the next; null = kv_heads", at_least=1)
    offset: int = setting(0, "blocks by which all shards are moved", at_least=0)
    homogeneous: bool = setting(
        False, "every key head has the shard of head 0: other blocks are seen in the window only"
    )
    dense_heads: int = setting(0, "how many of the last key heads meet every block", at_least=0)

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Those of all softmax mixers, and as many dense heads as there are."""
        found = super().problems(dim)
        kv_heads = self.kv_heads or self.heads
        if self.homogeneous and self.dense_heads:
            message = f"dense_heads {self.dense_heads} must be 0 while homogeneous is true: all heads are alike"
            found.append(("dense_heads", message))
        elif self.dense_heads > kv_heads:
            message = f"dense_heads {self.dense_heads} exceeds kv_heads {kv_heads}; nearest: {kv_heads}"
            found.append(("dense_heads", message))
        return found


@register("s2")
class S2(TokenAttention):
    """A query meets the blocks of its window, and of earlier ones those in the shard of its key head.

    Block c of tokens of a document is in the shard of key head g if (c + g step + offset) mod stride = 0, with
    step = max(1, floor(stride / kv_heads)).
    """

    Config = S2Config
    some_immortal = True

    def __init__(self, dim: int, config: S2Config) -> None:
        super().__init__(dim, config)
        self.stride = config.stride or self.kv_heads
        if self.kv_heads < self.stride and not config.dense_heads:
            warnings.warn(
                f"s2: kv_heads {self.kv_heads} is less than stride {self.stride} and dense_heads is 0: of every "
                f"{self.stride} blocks {self.stride - self.kv_heads} cannot be seen beyond the window of "
                f"{config.local_blocks * config.block} tokens in this layer",
                stacklevel=4,  # who called `build`
            )

    def death(self, clock: Clock) -> Tensor:
        """Never in the head's own shard, else local_blocks blocks after the start of the token's own."""
        config = self.config
        head = torch.arange(1 if config.homogeneous else self.kv_heads, device=clock.time.device)[:, None]
        position = clock.position[:, None]
        block, step = position // config.block, max(1, self.stride // self.kv_heads)
        kept = (block + head * step + config.offset) % self.stride == 0
        kept |= head >= self.kv_heads - config.dense_heads
        window_end = clock.starts[:, None] + (block + config.local_blocks) * config.block
        return torch.where(kept, FOREVER, window_end)
