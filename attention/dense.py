"""Full causal attention: every key lives for ever. Multi-head, grouped-query (GQA) or multi-query (MQA).

Sources: Shazeer, "Fast Transformer Decoding" (2019, arXiv 1911.02150) for kv_heads = 1; Ainslie et al., "GQA"
(2023, arXiv 2305.13245) for groups.
"""

import torch
from torch import Tensor

from attention.clock import Clock
from attention.earlier import EarlierKeys, shard_of
from attention.lifetimes import FOREVER
from attention.mixer import register
from attention.softmax import TokenAttention


@register("dense")
class Dense(TokenAttention):
    """A query meets itself and all earlier tokens of its document."""

    sequence_parallel = "heads for tokens; with fewer heads than ranks, keys"

    def death(self, clock: Clock) -> Tensor:
        """Never."""
        return torch.full((1, 1, clock.time.shape[1]), FOREVER, device=clock.time.device)

    def trades_heads(self, k: Tensor, past: EarlierKeys) -> bool:
        """If there are enough of them: of keys that never die, gathered, the last of n ranks would meet most, and all
        would wait for its (2n - 1) / n times their share of the work."""
        return self.heads >= len(shard_of(past.clock).lengths)
