"""Curves of time (or memory) against length: how fast they grow, where they lead, and where two of them cross.

Lengths are in tokens. On paper with logarithmic axes a power of the length is a straight line; so all is done there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

Curve = Mapping[int, float]
"""length -> seconds, or bytes, > 0."""


@dataclass(frozen=True)
class Crossover:
    """From which length on a curve lies below another, as far as both were measured (at `lengths`, rising).

    first: the least measured length from which on it is below at every one; None: not even at the longest.
    crossing: the length between `first` and the one before it at which the two lines meet; None where there is
    no length before it, or nothing to meet.
    """

    lengths: tuple[int, ...]
    first: int | None
    crossing: float | None

    def __str__(self) -> str:
        if self.first is None:
            return "nowhere"
        if self.crossing is None:
            return "everywhere"
        return f"{self.first:,} (~{self.crossing:,.0f})"


def crossover(ours: Curve, theirs: Curve) -> Crossover | None:
    """Where `ours` comes to lie below `theirs` for good; None if they share no length."""
    lengths = tuple(sorted(set(ours) & set(theirs)))
    if not lengths:
        return None
    above = [length for length in lengths if ours[length] >= theirs[length]]
    if not above:
        return Crossover(lengths, lengths[0], None)
    last = above[-1]
    if last == lengths[-1]:
        return Crossover(lengths, None, None)
    first = lengths[lengths.index(last) + 1]
    gap, next_gap = (math.log(ours[length] / theirs[length]) for length in (last, first))
    share = gap / (gap - next_gap)
    return Crossover(lengths, first, last * (first / last) ** share)


def growth(curve: Curve) -> float | None:
    """Least-squares slope of log(value) over log(length): p of length^p. None from less than two lengths."""
    if len(curve) < 2:
        return None
    lengths, values = ([math.log(number) for number in numbers] for numbers in (curve.keys(), curve.values()))
    return statistics.linear_regression(lengths, values).slope


def predicted(curve: Curve, length: int) -> float | None:
    """The value at a longer `length`, on the line through the last two points; None without any.

    With one point: as its square. At least linear: what costs nothing yet at small lengths will.
    """
    if not curve:
        return None
    *before, last = sorted(curve)
    power = 2.0 if not before else max(1.0, growth({n: curve[n] for n in (before[-1], last)}) or 0.0)
    return curve[last] * (length / last) ** power
