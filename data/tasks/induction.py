"""Induction: a random text, a gap, and the same text once more, which can be foretold from its second symbol on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.loader import UNSCORED
from data.tasks.draws import Draws
from data.tasks.task import Examples, Task, register, setting


@register("induction")
@dataclass(frozen=True)
class Induction(Task):
    """n = (T - gap) div 2 symbols drawn from 1..V-1, `gap` zeros, the same n symbols; an odd last token is 0.

    Scored are the second copy's symbols 2..n, each where the one before it stands. What tells the answer stands
    n + gap - 1 tokens back: farther than a window reaches if the gap is as wide. The distance being the same in all of
    an example, a model may also learn to look that far back.
    """

    vocab_size: int = setting(64, "v", "symbols, the one of the gap included", at_least=3)
    gap: int = setting(0, "g", "zeros between the two copies", at_least=0)

    def problems(self, length: int) -> list[tuple[str, str]]:
        if self.gap > length - 4:
            return [
                (
                    "gap",
                    f"two copies of 2 symbols and {self.gap} zeros take {self.gap + 4} tokens, an example has {length}",
                )
            ]
        return []

    def examples(self, draws: Draws, length: int) -> Examples:
        size = (length - self.gap) // 2
        text, second = 1 + draws.below(self.vocab_size - 1, size), size + self.gap
        tokens = np.zeros((len(draws), length), dtype=np.int64)
        tokens[:, :size] = tokens[:, second : second + size] = text
        labels = np.full_like(tokens, UNSCORED)
        labels[:, second : second + size - 1] = text[:, 1:]
        return Examples(tokens, labels)
