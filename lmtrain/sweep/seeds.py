"""Seeds together: what each variant of a comparison reaches, and how it differs from another in pairs of equal runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmtrain.scaling import Mean, mean_of
from lmtrain.sweep.comparison import Collected, axes_that_change, mixer_axes, place
from lmtrain.sweep.result import RunResult


@dataclass(frozen=True)
class Cell:
    """The runs of one variant at one place (the axes besides mixer, sparsity and seed, and the tokens): its seeds."""

    variant: str
    place: str
    runs: tuple[RunResult, ...]

    def mean(self, of: Callable[[RunResult], float]) -> Mean:
        """Over the seeds."""
        return mean_of([of(run) for run in self.runs])


@dataclass(frozen=True)
class Difference:
    """Loss of a variant minus that of another, of runs with equal seed and place, in the unit of the comparison."""

    variant: str
    other: str
    place: str
    mean: Mean

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {"variant": self.variant, "other": self.other, "place": self.place, **vars(self.mean)}

    def cells(self) -> list[str]:
        """For people: variant, place, difference, half of its interval, pairs, and what may be chance."""
        half = "" if self.mean.half is None else f"{self.mean.half:.4f}"
        return [self.variant, self.place, f"{self.mean.value:+.4f}", half, str(self.mean.count), self._verdict]

    @property
    def _verdict(self) -> str:
        if self.mean.half is None:
            return "one pair tells nothing about chance"
        return "" if self.mean.beyond_chance else "may be chance"


class Variants:
    """Mixers, and where sparsity varies within one, each of its values, side by side."""

    def __init__(self, collected: Collected) -> None:
        self._collected = collected
        runs = collected.runs
        self._labels = {run.name: self._label(run) for run in runs}
        without = {"seed"} | mixer_axes(runs) | axes_that_change(runs, lambda run: run.seed)
        for mixer in collected.mixers:
            without = without | axes_that_change(collected.of(mixer), lambda run: run.sparsity)
        durations = axes_that_change(runs, lambda run: run.tokens) - axes_that_change(runs, lambda run: run.parameters)
        self._without = without | durations
        cells: dict[tuple[str, str], list[RunResult]] = {}
        for run in sorted(runs, key=self._order):
            cells.setdefault((self._labels[run.name], self._place(run)), []).append(run)
        self.cells = [Cell(*key, tuple(found)) for key, found in cells.items()]

    @property
    def names(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(cell.variant for cell in self.cells))

    @property
    def places(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(cell.place for cell in self.cells))

    @property
    def baseline(self) -> str:
        """`dense`, or the first without it."""
        return "dense" if "dense" in self.names else self.names[0]

    def label(self, run: RunResult) -> str:
        """The variant of a run."""
        return self._labels[run.name]

    def differences(self) -> list[Difference]:
        """Of each variant from the baseline, place by place, then over all places where both were run."""
        cells = {(cell.variant, cell.place): cell for cell in self.cells}
        found: list[Difference] = []
        pooled: dict[str, list[float]] = {}
        for cell in self.cells:
            base = cells.get((self.baseline, cell.place))
            if base is None or cell.variant == self.baseline:
                continue
            theirs = {run.seed: self._collected.loss(run) for run in base.runs}
            pairs = [self._collected.loss(run) - theirs[run.seed] for run in cell.runs if run.seed in theirs]
            if pairs:
                found.append(Difference(cell.variant, self.baseline, cell.place, mean_of(pairs)))
                pooled.setdefault(cell.variant, []).extend(pairs)
        if len(self.places) > 1:
            found += [
                Difference(variant, self.baseline, "all places", mean_of(pairs)) for variant, pairs in pooled.items()
            ]
        return found

    def _label(self, run: RunResult) -> str:
        sparsities = {other.sparsity for other in self._collected.of(run.mixer)}
        name = run.mixer or self._collected.name
        return name if len(sparsities) == 1 or run.sparsity is None else f"{name}, rho {run.sparsity:g}"

    def _place(self, run: RunResult) -> str:
        axes = [f"{axis} {value}" for axis, value in place(run, self._without)]
        return ", ".join([*axes, f"{run.tokens:,} tokens"])

    def _order(self, run: RunResult) -> tuple[Any, ...]:
        return self._collected.mixers.index(run.mixer), run.sparsity or 0, run.parameters, run.tokens, run.name
