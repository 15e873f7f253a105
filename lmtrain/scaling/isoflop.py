"""IsoFLOP parabolas: for each budget the size of least loss, and how it grows. For comparison only.

They are biased even without noise: a parabola in ln N is not the law, and its minimum drifts with the sizes tried.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmtrain.scaling.forms import Array, distinct

EQUAL = 0.1
"""Budgets within this share of the smallest of them are one."""


@dataclass(frozen=True)
class Parabola:
    """loss = c0 + c1 ln N + c2 (ln N)^2 over the runs of one budget of C FLOPs, of which `members` are the indices.

    best: its minimum, N; None if it has none between the sizes that were tried: nothing was bracketed.
    """

    C: float
    members: tuple[int, ...]
    coefficients: tuple[float, float, float]
    sizes: tuple[float, float]
    best: float | None

    def at(self, N: Array) -> Array:
        """Losses, as drawn."""
        c0, c1, c2 = self.coefficients
        return c0 + c1 * np.log(N) + c2 * np.log(N) ** 2


@dataclass(frozen=True)
class IsoFlop:
    """A parabola for each budget with three sizes. exponent: of N*(C), from two budgets or more with a minimum."""

    parabolas: tuple[Parabola, ...]
    exponent: float | None


def budgets(C: Array) -> list[NDArray[np.int_]]:
    """Indices of runs of equal cost, cheapest first."""
    groups: list[list[int]] = []
    for index in np.argsort(C, kind="stable"):
        if groups and C[index] <= C[groups[-1][0]] * (1 + EQUAL):
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    return [np.array(group) for group in groups]


def isoflop(N: Array, C: Array, loss: Array) -> IsoFlop:
    """Of runs, [n] each."""
    parabolas = tuple(_parabola(N, C, loss, some) for some in budgets(C) if distinct(N[some]) >= 3)
    ends = [(math.log(p.C), math.log(p.best)) for p in parabolas if p.best is not None]
    if len(ends) < 2:
        return IsoFlop(parabolas, None)
    cost, best = zip(*ends, strict=True)
    return IsoFlop(parabolas, statistics.linear_regression(cost, best).slope)


def _parabola(N: Array, C: Array, loss: Array, some: NDArray[np.int_]) -> Parabola:
    c0, c1, c2 = (float(c) for c in np.polynomial.polynomial.polyfit(np.log(N[some]), loss[some], 2))
    best = float(np.exp(-c1 / (2 * c2))) if c2 > 0 else np.inf
    sizes = (float(N[some].min()), float(N[some].max()))
    cost = float(np.exp(np.log(C[some]).mean()))
    inside = sizes[0] <= best <= sizes[1]
    return Parabola(cost, tuple(some.tolist()), (c0, c1, c2), sizes, best if inside else None)
