"""Full causal attention: every key lives for ever. Multi-head, grouped-query (GQA) or multi-query (MQA).

Sources: Shazeer, "Fast Transformer Decoding" (2019, arXiv 1911.02150) for kv_heads = 1; Ainslie et al., "GQA"
(2023, arXiv 2305.13245) for groups.
"""

import torch
from torch import Tensor

from attention.clock import Clock
from attention.lifetimes import FOREVER
from attention.mixer import register
from attention.softmax import TokenAttention


@register("dense")
class Dense(TokenAttention):
    """A query meets itself and all earlier tokens of its document."""

    def death(self, clock: Clock) -> Tensor:
        """Never."""
        return torch.full((1, 1, clock.time.shape[1]), FOREVER, device=clock.time.device)
