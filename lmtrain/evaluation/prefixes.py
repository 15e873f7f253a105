"""A sample of targets to be scored prefix by prefix, and what it tells of all targets.

A selection that looks ahead can only be scored honestly one prefix at a time, which costs one pass per target: so of N
targets some are drawn. They are stratified by the number of tokens that they saw, in octaves, so that short and long
prefixes are both covered, though most targets see much. Of a stratum with N_s targets m_s are drawn without
replacement, m_s in proportion to the root of N_s. With g_s their mean of prefix-wise minus one-pass loss,

    gap = sum of N_s g_s / N        variance of gap = sum of (N_s / N)^2 sd_s^2 / m_s (1 - m_s / N_s)

whatever the m_s, the gap is unbiased; the last factor is there because targets are drawn without replacement.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from data.windows import Window
from lmtrain.evaluation.result import PositionLeak

STRATUM_EDGES = 8 << np.arange(32)
"""A stratum holds the targets that saw more than one edge, and at most the next one."""

PREFIX_TOKENS = 1 << 18
"""What all prefixes of a sample hold together, about, unless their number is given ..."""
FEWEST, MOST = 512, 16384
"""... but the sample has so many, if there are."""
AT_LEAST = 2
"""Of each stratum, so that it has a spread."""

SEED = 0


class Scored(Protocol):
    """Windows of equal shape, and the losses [B, S] of their last S targets."""

    @property
    def windows(self) -> list[Window]: ...
    @property
    def losses(self) -> np.ndarray: ...


class Shapes:
    """How many windows of which shape there are; what can be known without reading the text.

    targets [S]: how many there are in each stratum; tokens: all that one pass over the windows reads.
    """

    def __init__(self, windows: Iterable[Window]) -> None:
        shapes = Counter((w.first_scored - w.start, w.end - w.start) for w in windows)
        self.targets = np.zeros(len(STRATUM_EDGES), dtype=np.int64)
        self.seen = np.zeros(len(STRATUM_EDGES), dtype=np.int64)
        self.tokens = sum(last * count for (_, last), count in shapes.items())
        for (first, last), count in shapes.items():
            for stratum, low, high in _octaves(first, last):
                self.targets[stratum] += count * (high - low)
                self.seen[stratum] += count * (low + high - 1) * (high - low) // 2

    @property
    def total(self) -> int:
        """All targets."""
        return int(self.targets.sum())

    def allot(self, prefixes: int | None) -> np.ndarray:
        """How many targets of each stratum to draw [S], about `prefixes` in all; None: see `PREFIX_TOKENS`.

        In proportion to the root of their number, but `AT_LEAST` and no more than there are.
        """
        root = np.sqrt(self.targets)
        if prefixes is None:
            length = (root * self.seen / self.targets.clip(min=1)).sum() / root.sum()
            prefixes = int(np.clip(PREFIX_TOKENS / length, FEWEST, MOST))
        if prefixes >= self.total:
            return self.targets.copy()
        least = np.minimum(AT_LEAST, self.targets)
        low, high = 0.0, float(self.targets.max())
        for _ in range(60):  # the share of the root, by bisection
            middle = (low + high) / 2
            drawn = np.clip(middle * root, least, self.targets)
            low, high = (middle, high) if drawn.sum() < prefixes else (low, middle)
        return np.clip(np.round(high * root).astype(np.int64), least, self.targets)


class Sample:
    """Draws as many targets of each stratum as `allotted` says; keeps their prefixes and one-pass losses."""

    def __init__(self, shapes: Shapes, allotted: np.ndarray, seed: int = SEED) -> None:
        generator = np.random.default_rng(seed)
        self.targets = shapes.targets
        self.chosen = [np.sort(generator.choice(n, m, replace=False)) for n, m in zip(shapes.targets, allotted)]
        self.passed = np.zeros(len(STRATUM_EDGES), dtype=np.int64)
        self.one_pass = np.zeros(len(STRATUM_EDGES))
        self.prefixes: list[Window] = []
        self.losses: list[float] = []

    def add(self, scored: Scored) -> None:
        """Take those of the batch that were drawn. Batches must come in the order of the windows counted."""
        windows, losses = scored.windows, scored.losses
        first = windows[0].first_scored - windows[0].start
        for stratum, low, high in _octaves(first, windows[0].end - windows[0].start):
            part = losses[:, low - first : high - first]
            begin = self.passed[stratum]
            self.passed[stratum] += part.size
            self.one_pass[stratum] += part.sum()
            chosen = self.chosen[stratum]
            for index in chosen[slice(*np.searchsorted(chosen, [begin, begin + part.size]))] - begin:
                row, column = divmod(int(index), high - low)
                target = windows[row].start + low + column
                self.prefixes.append(Window(windows[row].start, target, target))
                self.losses.append(float(part[row, column]))

    @property
    def tokens(self) -> int:
        """All that the prefixes hold."""
        return sum(prefix.end - prefix.start for prefix in self.prefixes)

    def in_order(self) -> list[int]:
        """Indices of the prefixes, from short to long: those of equal length make a batch."""
        return sorted(range(len(self.prefixes)), key=lambda i: self.prefixes[i].end - self.prefixes[i].start)

    def leaks(self, alone: np.ndarray) -> tuple[PositionLeak, ...]:
        """What each stratum leaks, given the losses of the prefixes alone, in the order of `prefixes`."""
        gaps = alone - np.array(self.losses)
        seen = np.array([prefix.end - prefix.start for prefix in self.prefixes])
        of = np.searchsorted(STRATUM_EDGES, seen)
        edges = [0, *STRATUM_EDGES.tolist()]
        found = []
        for stratum in np.flatnonzero(self.targets).tolist():
            gap, total = gaps[of == stratum], int(self.targets[stratum])
            deviation = gap.std(ddof=1) if len(gap) > 1 else 0.0 if len(gap) == total else np.nan
            found.append(
                PositionLeak(
                    start=edges[stratum],
                    stop=edges[stratum + 1],
                    tokens=total,
                    one_pass_loss=float(self.one_pass[stratum] / total),
                    gap=float(gap.mean()),
                    gap_standard_error=float(deviation * np.sqrt((1 - len(gap) / total) / len(gap))),
                    prefixes=len(gap),
                )
            )
        return tuple(found)


def _octaves(first: int, last: int) -> Iterable[tuple[int, int, int]]:
    """(stratum, from, to): the targets that saw first..last tokens, by stratum, as ranges [from, to) of tokens seen."""
    lowest, highest = np.searchsorted(STRATUM_EDGES, [first, last])
    cuts = [first, *(int(edge) + 1 for edge in STRATUM_EDGES[lowest:highest]), last + 1]
    return ((lowest + i, low, high) for i, (low, high) in enumerate(itertools.pairwise(cuts)))
