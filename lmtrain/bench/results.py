"""What was measured, and what follows from it: speed-ups, growth, crossovers, where a mixer loses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmtrain.bench.curves import Crossover, crossover
from lmtrain.bench.measure import Timing
from lmtrain.bench.subjects import PARTS, Part

Pass = Literal["forward", "both"]


@dataclass(frozen=True)
class Row:
    """One subject at one length. peak_bytes: of forward and backward, beside inputs and weights."""

    name: str
    part: Part
    baseline: str | None
    length: int
    forward: Timing
    both: Timing
    peak_bytes: int
    pairs: float
    block_mask_seconds: float | None = None


@dataclass(frozen=True)
class Skip:
    """What was not measured at a length, and why; name None: nothing was."""

    length: int
    name: str | None
    part: Part | None
    reason: str

    def __str__(self) -> str:
        what = "" if self.name is None else f" {self.name} ({self.part})"
        return f"skipped at {self.length:,} tokens:{what or ' all'}: {self.reason}"


@dataclass(frozen=True)
class Comparison:
    """A subject beside its baseline: the rows of both by length, of which the subject has at least one."""

    rows: dict[int, Row]
    base: dict[int, Row]

    @property
    def name(self) -> str:
        return next(iter(self.rows.values())).name

    @property
    def part(self) -> Part:
        return next(iter(self.rows.values())).part

    @property
    def baseline(self) -> str:
        return str(next(iter(self.rows.values())).baseline)

    @property
    def lengths(self) -> list[int]:
        """At which both were measured, rising."""
        return sorted(set(self.rows) & set(self.base))

    def speed_up(self, length: int, which: Pass) -> float:
        """How many times as fast as the baseline it is."""
        return seconds(self.base, which)[length] / seconds(self.rows, which)[length]

    def bound(self, length: int) -> float:
        """The speed-up that pairs alone would allow."""
        return self.base[length].pairs / self.rows[length].pairs

    def memory(self, length: int) -> float:
        """Peak memory over that of the baseline."""
        return self.rows[length].peak_bytes / self.base[length].peak_bytes

    def crossover(self, which: Pass) -> Crossover | None:
        """From which length on it is faster; None without a common length."""
        return crossover(seconds(self.rows, which), seconds(self.base, which))

    def loses(self, which: Pass) -> list[int]:
        """Lengths at which it is not faster."""
        return [length for length in self.lengths if self.speed_up(length, which) <= 1]

    def close(self, length: int, which: Pass) -> bool:
        """Whether the repeats of the two overlap: too close to call."""
        ours, theirs = getattr(self.rows[length], which), getattr(self.base[length], which)
        return bool(ours.least <= theirs.most and theirs.least <= ours.most)


def seconds(rows: dict[int, Row], which: Pass) -> dict[int, float]:
    """The curve of median seconds."""
    return {length: getattr(row, which).median for length, row in rows.items()}


@dataclass
class Results:
    """Rows in the order of lengths, then subjects; what was skipped."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Those measured, rising."""
        return sorted({row.length for row in self.rows})

    def names(self, part: Part) -> list[str]:
        """Subjects of the part, in order."""
        return list(dict.fromkeys(row.name for row in self.rows if row.part == part))

    def of(self, subject: str, part: Part) -> dict[int, Row]:
        """The subject's rows by length."""
        return {row.length: row for row in self.rows if (row.name, row.part) == (subject, part)}

    def comparison(self, name: str, part: Part) -> Comparison | None:
        """The subject beside its baseline; None for one that has none, or was never measured."""
        rows = self.of(name, part)
        baseline = next((row.baseline for row in rows.values()), None)
        return None if baseline is None else Comparison(rows, self.of(baseline, part))

    def comparisons(self) -> list[Comparison]:
        """All of them."""
        return [c for part in PARTS for name in self.names(part) if (c := self.comparison(name, part))]
