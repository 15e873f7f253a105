"""Figures as data: what is drawn, apart from how; and the ticks of an axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from lmtrain.config.problems import printable

COLOURS = 12
"""Of a palette; series with larger numbers begin again, with another marker."""


@dataclass(frozen=True)
class Point:
    """A mark; text: what it is, shown when pointed at."""

    x: float
    y: float
    text: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour. label: "" keeps it out of the legend. marks, line: how they are drawn; dashed: the line.

    whiskers: (x, y) to (x, y), intervals of single points. band: (x, low, high), of the line.
    """

    label: str
    colour: int
    points: Sequence[Point]
    marks: bool = True
    line: bool = False
    dashed: bool = False
    whiskers: Sequence[tuple[float, float, float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """A figure. name: of its file; rows: names of y = 0, 1, ..., from the top down, instead of a scale.

    x_ticks: the values of x that were tried, rising, where those are better marked than round numbers.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    rows: Sequence[str] = ()
    x_ticks: Sequence[float] = ()

    def range(self, axis: int) -> tuple[float, float]:
        """Least and most of what is drawn along x (0) or y (1), a little widened."""
        if axis == 1 and self.rows:
            return -0.5, len(self.rows) - 0.5
        values = [(p.x, p.y)[axis] for s in self.series for p in s.points]
        values += [end for s in self.series for w in s.whiskers for end in (w[axis], w[axis + 2])]
        values += [bound for s in self.series for b in s.band for bound in ((b[0],), b[1:])[axis]]
        return widened(min(values), max(values), (self.log_x, self.log_y)[axis])

    def ticks(self, axis: int) -> list[tuple[float, str]]:
        """Where x (0) or y (1) is marked, and as what."""
        if axis == 1 and self.rows:
            return [*enumerate(self.rows)]
        low, high = self.range(axis)
        log = (self.log_x, self.log_y)[axis]
        chosen = apart(self.x_ticks, low, high, log) if axis == 0 and self.x_ticks else ticks(low, high, log)
        return [(value, short(value)) for value in chosen]


def widened(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range with 4 % of room at each side; a single value gets a range, too."""
    if log:
        low, high = widened(math.log(low), math.log(high), False)
        return math.exp(low), math.exp(high)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def safe(text: object) -> str:
    """Text for HTML and SVG, whatever a user has named so."""
    return escape(printable(str(text), limit=2000))


def ticks(low: float, high: float, log: bool) -> list[float]:
    """About five round numbers within the range."""
    if log and high / low >= 4:
        steps: tuple[int, ...] = (1,) if high / low > 1e3 else (1, 2, 5)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**decade for decade in decades for step in steps]
        inside = [value for value in found if low <= value <= high]
        return inside[:: math.ceil(len(inside) / 8)]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * s for s in (1, 2, 5, 10) if unit * s >= rough * 0.999)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def apart(values: Sequence[float], low: float, high: float, log: bool) -> list[float]:
    """The rising values but those whose text would meet that of the one before, on an axis from low to high."""
    along: Callable[[float], float] = math.log if log else float
    room = (along(high) - along(low)) / 12
    found: list[float] = []
    for value in values:
        if not found or along(value) - along(found[-1]) >= room:
            found.append(value)
    return found


def short(value: float) -> str:
    """A tick, with the letters k, M, G, T, P, E from a thousand on."""
    if value and abs(value) >= 1000:
        power = min(6, int(math.log10(abs(value)) / 3 + 1e-9))
        return f"{value / 1000**power:.4g}{' kMGTPE'[power]}"
    return f"{value:.4g}"
