"""Sliding-window attention: a key lives for `window` steps.

A query meets itself and the window - 1 tokens before it, so N layers carry information N (window - 1) steps.
"""

from dataclasses import dataclass

from torch import Tensor

from attention.clock import Clock
from attention.mixer import register, setting
from attention.softmax import AttentionConfig, TokenAttention


@dataclass
class LocalConfig(AttentionConfig):
    """Settings of `local`."""

    window: int = setting(256, "keys that a query meets, its own included", at_least=1)


@register("local")
class Local(TokenAttention):
    """A query meets itself and the window - 1 tokens before it."""

    Config = LocalConfig

    def death(self, clock: Clock) -> Tensor:
        """Its own time + window."""
        return clock.time[:, None] + self.config.window
