"""Random numbers of many examples at once, each example's a pure function of its own key.

Frozen: any change here changes what runs of a given seed read, and the examples held out;
`tests/data/tasks/test_draws.py` holds it fast. None of numpy's random streams is used, which may change (NEP 19).
"""

from __future__ import annotations

import numpy as np

from data.order import GOLDEN, mix

SPLITS = ("train", "validation", "test")


def example_keys(seed: int, split: str, indices: np.ndarray) -> np.ndarray:
    """uint64 [B]: the key of each example; those of another seed, split or index share nothing with it."""
    seeds, number = np.array([[seed % 2**64], [SPLITS.index(split) + 1]], dtype=np.uint64)
    stream = mix(mix(seeds + GOLDEN) + number * GOLDEN)
    return mix(stream + (np.asarray(indices, dtype=np.uint64) + np.uint64(1)) * GOLDEN)


class Draws:
    """Draws for B examples side by side, from their keys uint64 [B]; no row depends on another."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys[:, None]
        self._used = 0

    def __len__(self) -> int:
        return len(self._keys)

    def uniform(self, count: int) -> np.ndarray:
        """float64 [B, count], uniform between 0 and 1, both excluded."""
        steps = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64)
        self._used += count
        numbers = mix(self._keys + steps * GOLDEN) >> np.uint64(12)
        return (numbers.astype(np.float64) + 0.5) * 2.0**-52

    def below(self, bound: int, count: int) -> np.ndarray:
        """int64 [B, count], each uniform on 0..bound-1."""
        return (self.uniform(count) * bound).astype(np.int64)

    def distinct(self, bound: int, count: int) -> np.ndarray:
        """int64 [B, count]: numbers of 0..bound-1 in random order, none twice."""
        return self.weighted(np.ones(bound), count)

    def weighted(self, weights: np.ndarray, count: int) -> np.ndarray:
        """int64 [B, count]: indices of `weights` [n], one after another in proportion to the weights of those left.

        Of exponential waiting times with these rates the first is i in proportion to weight i, and so on with the rest.
        """
        assert 0 <= count <= len(weights)
        waits = -np.log(self.uniform(len(weights))) / weights
        return np.argsort(waits, axis=1, kind="stable")[:, :count]
