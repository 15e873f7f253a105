"""Seeds together: what each variant of a comparison reaches, and how it differs from another in pairs of equal runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from lmtrain.scaling import CONFIDENCE, Mean, holm, mean_of
from lmtrain.sweep.comparison import Collected, axes_that_change, mixer_axes, place
from lmtrain.sweep.result import RunResult

EVERYWHERE = "all places"
"""The place of a difference over all of them."""


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
    """Loss of a variant minus that of another, of runs with equal seed and place, in the unit of the comparison.

    p: how often chance alone makes even one difference among all variants at this place look so sure, where none is
    (Student's t, then Holm's rule for several comparisons); None if there is one pair.
    """

    variant: str
    other: str
    place: str
    mean: Mean
    p: float | None

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {"variant": self.variant, "other": self.other, "place": self.place, **vars(self.mean), "p": self.p}

    def cells(self) -> list[str]:
        """For people, below `head`."""
        half = "" if self.mean.half is None else f"{self.mean.half:.4f}"
        p = "" if self.p is None else f"{self.p:.2g}"
        return [self.variant, self.place, f"{self.mean.value:+.4f}", half, str(self.mean.count), p, self._verdict]

    @staticmethod
    def head(unit: str) -> list[str]:
        """The names of `cells`."""
        return ["variant", "at", unit, f"± ({100 * CONFIDENCE:g} %)", "pairs", "p of all", ""]

    @property
    def beyond_chance(self) -> bool:
        """Whether it is one, for all that these pairs say."""
        return self.p is not None and self.p < 1 - CONFIDENCE

    @property
    def _verdict(self) -> str:
        if self.p is None:
            return "one pair tells nothing about chance"
        return "" if self.beyond_chance else "may be chance"


def telling(differences: Sequence[Difference]) -> tuple[list[Difference], str]:
    """Those to show: without single pairs, unless there is nothing else; and a sentence that says so, else ""."""
    several = [difference for difference in differences if difference.mean.count > 1]
    alone = len(differences) - len(several)
    if not several or not alone:
        return list(differences), ""
    return several, f"Left out: {alone} of a single pair, which tells nothing about chance; fit.json has them."


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
        """Of each variant from the baseline, place by place, then over all places where both were run: there forks of
        one trunk, whose luck is one, count once, by their mean."""
        cells = {(cell.variant, cell.place): cell for cell in self.cells}
        pairs_at: dict[str, dict[str, list[float]]] = {place: {} for place in self.places}
        pooled: dict[str, dict[str, list[float]]] = {}
        for cell in self.cells:
            base = cells.get((self.baseline, cell.place))
            if base is None or cell.variant == self.baseline:
                continue
            theirs = {run.seed: self._collected.loss(run) for run in base.runs}
            for run in (run for run in cell.runs if run.seed in theirs):
                pair = self._collected.loss(run) - theirs[run.seed]
                pairs_at[cell.place].setdefault(cell.variant, []).append(pair)
                pooled.setdefault(cell.variant, {}).setdefault(run.group, []).append(pair)
        if len(self.places) > 1:
            pairs_at[EVERYWHERE] = {name: [*map(fmean, trunks.values())] for name, trunks in pooled.items()}
        return [found for place, pairs in pairs_at.items() for found in self._family(place, pairs)]

    def _family(self, place: str, pairs: dict[str, list[float]]) -> list[Difference]:
        """The differences at one place: {variant: those of its pairs}."""
        found = [Difference(name, self.baseline, place, mean_of(values), None) for name, values in pairs.items()]
        alone = {difference.variant: p for difference in found if (p := difference.mean.p_value) is not None}
        raised = dict(zip(alone, holm(list(alone.values()))))
        return [replace(difference, p=raised.get(difference.variant)) for difference in found]

    def _label(self, run: RunResult) -> str:
        sparsities = {other.sparsity for other in self._collected.of(run.mixer)}
        name = run.mixer or self._collected.name
        return name if len(sparsities) == 1 or run.sparsity is None else f"{name}, rho {run.sparsity:g}"

    def _place(self, run: RunResult) -> str:
        axes = [f"{axis} {value}" for axis, value in place(run, self._without)]
        return ", ".join([*axes, f"{run.tokens:,} tokens"])

    def _order(self, run: RunResult) -> tuple[Any, ...]:
        return self._collected.mixers.index(run.mixer), run.sparsity or 0, run.parameters, run.tokens, run.name
