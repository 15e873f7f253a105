"""`lmtrain sweep fit`: the law of each mixer, and paired differences between mixers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.files import replace_bytes
from lmtrain.scaling import Fitted, IsoFlop, Points, distinct, fit, fit_sparse, isoflop
from lmtrain.sweep.comparison import Collected
from lmtrain.sweep.fit_text import format_fits
from lmtrain.sweep.result import RunResult
from lmtrain.sweep.seeds import Difference, Variants

FILE = "fit.json"
FURTHER = 10.0
"""How far beyond the largest run the law is asked, in FLOPs; with its interval."""


@dataclass(frozen=True)
class MixerFit:
    """The law of one mixer's runs, the better of two where sparsity varies; `refusal` says why there is none.

    runs: that it is fitted to. outdone: runs that another one of equal size, tokens, sparsity and seed beat by some
    other setting, left out. factor: C / (N D), median, least and most of the runs.
    """

    mixer: str
    runs: tuple[RunResult, ...]
    outdone: tuple[RunResult, ...]
    laws: tuple[Fitted, ...]
    refusal: str
    parabolas: IsoFlop
    factor: tuple[float, float, float]

    @property
    def budget(self) -> float:
        """FLOPs at which the law is asked beyond the runs."""
        return FURTHER * max(run.flops for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """For machines; every number of a law with its interval."""
        return {
            "mixer": self.mixer,
            "runs": [run.name for run in self.runs],
            "outdone": [run.name for run in self.outdone],
            "refusal": self.refusal or None,
            "laws": [self._law(law) for law in self.laws],
            "flops_per_parameter_and_token": dict(zip(("median", "least", "most"), self.factor, strict=True)),
            "isoflop": {
                "biased": True,
                "exponent": self.parabolas.exponent,
                "minima": [{"flops": p.C, "parameters": p.best} for p in self.parabolas.parabolas],
            },
        }

    def _law(self, law: Fitted) -> dict[str, Any]:
        best = law.best_size(self.budget, self.factor[0])
        return {
            "formula": law.form.formula,
            **{name: _finite(law.interval(name)) for name in [*law.form.names, "n*"]},
            "best_size": {"flops": self.budget, "parameters": _finite(best)},
            "scatter": law.scatter,
            "held_out_error": law.held_out_error,
            "held_out_runs": int(law.held_out.size),
            "outliers": [run.name for run, out in zip(self.runs, law.outliers, strict=True) if out],
        }


def _finite(interval: Sequence[float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    names = ("value", "low", "high")
    return {name: float(x) if np.isfinite(x) else None for name, x in zip(names, interval, strict=True)}


@dataclass(frozen=True)
class SweepFit:
    """All that is fitted to a sweep."""

    collected: Collected
    fits: tuple[MixerFit, ...]
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        c = self.collected
        return {
            "sweep": c.name,
            "unit": c.unit.name,
            "note": c.unit.note or None,
            "claimed": [run.name for run in c.claimed],
            "mixers": [fit.to_json() for fit in self.fits],
            "differences": [difference.to_json() for difference in self.differences],
        }

    def format(self) -> str:
        """For people."""
        return format_fits(self)

    def write(self, folder: Path) -> Path:
        """Keep the JSON in the sweep's folder, instead of that of an earlier call."""
        path = folder / FILE
        replace_bytes(path, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())
        return path


def fit_sweep(collected: Collected) -> SweepFit:
    """Fit each mixer by itself; what cannot be fitted says why."""
    fits = tuple(_fit_mixer(collected, mixer) for mixer in collected.mixers)
    return SweepFit(collected, fits, tuple(Variants(collected).differences()))


def _fit_mixer(collected: Collected, mixer: str) -> MixerFit:
    runs, outdone = _best_of_equals(collected, mixer)
    points = points_of(collected, runs)
    laws, refusal = [], ""
    try:
        laws = fit_sparse(points) if distinct(points.rho) > 1 else [fit(points)]
    except ValueError as error:
        refusal = str(error)
    C = np.array([run.flops for run in runs])
    factor = C / (points.N * points.D)
    return MixerFit(
        mixer,
        tuple(runs),
        tuple(outdone),
        tuple(laws),
        refusal,
        isoflop(points.N, C, points.loss),
        (float(np.median(factor)), float(factor.min()), float(factor.max())),
    )


def points_of(collected: Collected, runs: Sequence[RunResult]) -> Points:
    """The runs as a fit sees them, losses in the comparison's unit."""
    return Points.of(
        [run.parameters for run in runs],
        [run.tokens for run in runs],
        [collected.loss(run) for run in runs],
        [run.sparsity or 1.0 for run in runs],
        [run.group for run in runs],
    )


def _best_of_equals(collected: Collected, mixer: str) -> tuple[list[RunResult], list[RunResult]]:
    """The mixer's runs without those that another one of the same size, tokens, sparsity and seed beats: a law is of
    runs at their best learning rate, not at all that were tried."""
    best: dict[tuple[Any, ...], RunResult] = {}
    for run in sorted(collected.of(mixer), key=collected.loss):
        best.setdefault((run.parameters, run.tokens, run.sparsity, run.seed), run)
    kept = {run.name for run in best.values()}
    runs = collected.of(mixer)
    return [run for run in runs if run.name in kept], [run for run in runs if run.name not in kept]
