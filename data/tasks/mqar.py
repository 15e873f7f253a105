"""Multi-query associative recall: pairs of key and value first, then all keys once more, each to be answered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.loader import UNSCORED
from data.tasks.draws import Draws
from data.tasks.task import Examples, Task, register, setting

ALPHA = 0.01


@register("mqar")
@dataclass(frozen=True)
class MQAR(Task):
    """Keys are 1..V/2-1, values V/2..V-1, both without repetition; the label stands at the query itself.

    The k pairs fill the first 2k tokens. Query j stands at 2k + 2 (g_j - 1), where the gaps g_j are drawn from
    1..(T - 2k) div 2 without replacement, in proportion to g^(0.01 - 1); all other tokens are 0. Arora et al.,
    "Zoology" (2023, arXiv 2312.04927), appendix on synthetics, and the data of their figure 2.
    """

    vocab_size: int = setting(256, "v", "symbols: half of them keys, the others values", at_least=4)
    pairs: int = setting(16, "k", "pairs of key and value, each asked for once", at_least=1)

    def problems(self, length: int) -> list[tuple[str, str]]:
        found = []
        if 4 * self.pairs > length:
            found.append(
                ("pairs", f"an example of {length} tokens holds at most {length // 4} pairs with their queries")
            )
        if self.pairs > (most := self.vocab_size // 2 - 1):
            found.append(("pairs", f"a vocabulary of {self.vocab_size} has keys for at most {most} pairs"))
        return found

    def examples(self, draws: Draws, length: int) -> Examples:
        half, asked = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + draws.distinct(half - 1, self.pairs)
        values = half + draws.distinct(self.vocab_size - half, self.pairs)
        gaps = np.arange(1, (length - asked) // 2 + 1)
        queries = asked + 2 * draws.weighted(gaps ** (ALPHA - 1), self.pairs)
        tokens = np.zeros((len(draws), length), dtype=np.int64)
        tokens[:, 0:asked:2], tokens[:, 1:asked:2] = keys, values
        labels = np.full_like(tokens, UNSCORED)
        np.put_along_axis(tokens, queries, keys, axis=1)
        np.put_along_axis(labels, queries, values, axis=1)
        return Examples(tokens, labels)
