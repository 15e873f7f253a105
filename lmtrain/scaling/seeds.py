"""Means over seeds with their confidence, by Student's t; the same of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean of `count` values. half: what to add and subtract for the interval that holds the true mean in 95 of
    100 cases; None of a single value, which says nothing about its spread."""

    value: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" ± {self.half:.4f}" if self.half is not None else "")

    @property
    def p_value(self) -> float | None:
        """How often a mean so far from 0 comes by chance if the truth is 0; None of a single value."""
        if self.half is None:
            return None
        if self.half == 0:
            return float(self.value == 0)
        return 1 - _within(abs(self.value) / self.half * student(self.count - 1), self.count - 1)


def mean_of(values: Sequence[float]) -> Mean:
    """Of at least one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Mean(mean, student(count - 1) * deviation / math.sqrt(count), count)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of comparisons, raised so that the chance of even one false verdict in the family stays
    below the level that they are compared with (Holm 1979, Scandinavian Journal of Statistics 6)."""
    raised = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        raised[index] = least
    return raised


def student(freedom: int, confidence: float = CONFIDENCE) -> float:
    """What |t| of so many degrees of freedom exceeds in 1 - confidence of the cases."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t): a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(theta) ** 2
    term = math.sin(theta) if freedom % 2 == 0 else math.sin(theta) * math.cos(theta)
    total = 0.0
    for n in range(2 + freedom % 2, freedom + 1, 2):
        total += term
        term *= cosine * (n - 1) / n
    return total if freedom % 2 == 0 else (theta + total) * 2 / math.pi
