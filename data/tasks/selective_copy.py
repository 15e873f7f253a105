"""Selective copy: symbols strewn among blanks, to be said in their order at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.loader import UNSCORED
from data.tasks.draws import Draws
from data.tasks.task import Examples, Task, register, setting

BLANK, SAY = 0, 1


@register("selective_copy")
@dataclass(frozen=True)
class SelectiveCopy(Task):
    """n symbols of 2..V-1 stand at random places of the first T - n tokens, which else are 0; then n times 1.

    At the i-th 1 the label is the i-th symbol. Places vary, so no fixed distance helps. Gu and Dao, "Mamba" (2023,
    arXiv 2312.00752), section 3.1, after Jing et al. (2019).
    """

    vocab_size: int = setting(16, "v", "symbols, blank and sign to answer included", at_least=3)
    symbols: int = setting(16, "n", "how many to remember", at_least=1)

    def problems(self, length: int) -> list[tuple[str, str]]:
        if 2 * self.symbols > length:
            return [
                ("symbols", f"an example of {length} tokens holds at most {length // 2} symbols with their answers")
            ]
        return []

    def examples(self, draws: Draws, length: int) -> Examples:
        asked = length - self.symbols
        places = np.sort(draws.distinct(asked, self.symbols), axis=1)
        symbols = 2 + draws.below(self.vocab_size - 2, self.symbols)
        tokens = np.full((len(draws), length), BLANK, dtype=np.int64)
        np.put_along_axis(tokens, places, symbols, axis=1)
        tokens[:, asked:] = SAY
        labels = np.full_like(tokens, UNSCORED)
        labels[:, asked:] = symbols
        return Examples(tokens, labels)
