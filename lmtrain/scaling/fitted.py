"""A law with what is known about it: intervals by a bootstrap, and the error on runs that it did not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmtrain.scaling.forms import EFFECTIVE, LEAST_DISTINCT, LOGARITHM, PLAIN, Array, Form, Points, distinct
from lmtrain.scaling.search import Laws, search

LEVEL = 0.9
"""Of every interval here."""
RESAMPLES = 300
COARSE = 1e-4
"""How finely the exponents of a resample are found: far below the width of any interval."""
HELD_OUT = 0.2
"""Share of the runs, those with most FLOPs, that the held-out error leaves out."""
HUBER = 2.5
"""Residuals beyond so many standard deviations count as their size, not its square: 1 in 80 if all are Gaussian."""
COLLINEAR = 0.999
"""Correlation of ln N and ln rho from which on nobody can tell what either does."""


class Interval(NamedTuple):
    """A number, and the bounds between which it lies in 90 of 100 cases."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Fitted:
    """The law of `points`, the same for each resample of them, and the relative errors on the largest runs, signed.

    weights: [n] of the runs; below 1 for outliers. held_out: empty if too few runs are left without the largest.
    """

    points: Points
    law: Laws
    resamples: Laws
    weights: Array
    held_out: Array

    @property
    def form(self) -> Form:
        return self.law.form

    def interval(self, name: str) -> Interval:
        """Of a coefficient, an exponent, `g`, or `n*`: N*(C) grows as C^(n*) where C is proportional to N D."""
        return Interval(float(self.law.values(name)[0]), *_bounds(self.resamples.values(name)))

    def predict(self, points: Points) -> tuple[Array, Array, Array]:
        """Predicted losses, [n], and their bounds: of the law, not of a run, which scatters about it."""
        low, high = np.quantile(self.resamples.at(points), _QUANTILES, axis=0)
        return self.law.at(points)[0], low, high

    def best_size(self, C: float, factor: float) -> Interval:
        """N of the least loss that C = factor N D FLOPs can buy, at sparsity 1; infinite where D does not matter."""
        return Interval(float(self.law.best_size(C, factor)[0]), *_bounds(self.resamples.best_size(C, factor)))

    @property
    def scatter(self) -> float:
        """Root mean square of the relative residuals, over the degrees of freedom that are left."""
        left = len(self.points) - self.form.unknowns
        return float(np.sqrt(self.law.error[0] * self.weights.sum() / left))

    @property
    def held_out_error(self) -> float | None:
        """Root mean square of the relative errors on the largest runs; None without any."""
        return float(np.sqrt((self.held_out**2).mean())) if self.held_out.size else None

    @property
    def outliers(self) -> Array:
        """Which runs count less than half, [n] bool."""
        return np.asarray(self.weights < 0.5)


_QUANTILES = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def _bounds(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, _QUANTILES, method="nearest")  # infinities have no middle
    return float(low), float(high)


def fit(
    points: Points, form: Form = PLAIN, *, robust: bool = True, resamples: int = RESAMPLES, seed: int = 0
) -> Fitted:
    """The law of these runs. robust: Huber's loss, by weights, which the resamples keep.

    ValueError says in words what is missing for one.
    """
    _refuse(points, form)
    law, weights = _robust(points, form) if robust else (search(form, points, np.ones((1, len(points)))), None)
    weights = np.ones(len(points)) if weights is None else weights
    counts = _resampled(points, form, resamples, np.random.default_rng(seed))
    drawn = search(form, points, counts * weights, law.exponents[0], law.centre, COARSE)
    return Fitted(points, law, drawn, weights, held_out(points, form, robust=robust))


def fit_sparse(points: Points, *, robust: bool = True, resamples: int = RESAMPLES, seed: int = 0) -> list[Fitted]:
    """Both laws with sparsity, the one with the smaller held-out error first (without any: the smaller scatter)."""
    both = [fit(points, form, robust=robust, resamples=resamples, seed=seed) for form in (EFFECTIVE, LOGARITHM)]
    return sorted(both, key=lambda f: f.scatter if f.held_out_error is None else f.held_out_error)


def held_out(points: Points, form: Form = PLAIN, *, robust: bool = True) -> Array:
    """Relative errors, predicted / measured - 1, on the runs with most N D, of the law that the others have.

    Empty if those are too few for one. Runs as large as the smallest left out are left out, too.
    """
    cost = points.N * points.D
    border = np.sort(cost)[-max(1, round(HELD_OUT * len(points)))]
    largest = cost >= border * (1 - 1e-9)
    rest = points[~largest]
    if problems(rest, form):
        return np.empty(0)
    law = _robust(rest, form)[0] if robust else search(form, rest, np.ones((1, len(rest))))
    return np.asarray(law.at(points[largest])[0] / points.loss[largest] - 1)


def problems(points: Points, form: Form = PLAIN) -> list[str]:
    """Why these runs are too few for a law of this form, in words."""
    found = [
        f"{what}: {distinct(values)} distinct, at least {LEAST_DISTINCT} are needed"
        for what, values in (("sizes N", points.N), ("token counts D", points.D))
        if distinct(values) < LEAST_DISTINCT
    ]
    if len(points) <= form.unknowns:
        found.append(f"runs: {len(points)} for {form.unknowns} unknowns, at least {form.unknowns + 1} are needed")
    if form is not PLAIN and not found:
        if distinct(points.rho) < 3:
            found.append(f"sparsities: {distinct(points.rho)} distinct, at least 3 are needed")
        elif abs(np.corrcoef(np.log(points.N), np.log(points.rho))[0, 1]) > COLLINEAR:
            found.append("N and sparsity rise together, so nobody can tell which of them moves the loss")
    return found


def _refuse(points: Points, form: Form) -> None:
    if found := problems(points, form):
        raise ValueError(f"too few points for {form.formula}: {'; '.join(found)}")


def _robust(points: Points, form: Form) -> tuple[Laws, Array]:
    """Weights that make least squares Huber's loss, found by turns; its scale follows the median residual."""
    weights = np.ones(len(points))
    law = search(form, points, weights[None])
    for _ in range(50):
        residuals = np.abs(1 - law.at(points)[0] / points.loss)
        border = HUBER * 1.4826 * np.median(residuals)
        new = np.minimum(1.0, border / np.maximum(residuals, 1e-300)) if border > 1e-12 else 1.0 * (residuals < 1e-9)
        if np.abs(new - weights).max() < 1e-3:
            break
        weights = new
        law = search(form, points, weights[None], law.exponents[0], law.centre)
    return law, weights


def _resampled(points: Points, form: Form, resamples: int, random: np.random.Generator) -> Array:
    """How often each run is drawn, [resamples, n]: groups with replacement, again where a law cannot be found.

    Fewer than there are, since the fit has used up as many runs as it has unknowns: else intervals are too narrow.
    """
    names, group = np.unique(points.group, return_inverse=True)
    number = max(3, round(names.size * (1 - form.unknowns / len(points))))
    drawn: list[Array] = []
    for _ in range(100 * resamples):
        counts = random.multinomial(number, np.full(names.size, 1 / names.size))[group].astype(float)
        some = points[counts > 0]
        if min(distinct(some.N), distinct(some.D)) >= 3 and (form is PLAIN or distinct(some.rho) >= 2):
            drawn.append(counts)
        if len(drawn) == resamples:
            return np.stack(drawn)
    raise ValueError(f"independent runs: {names.size}, too few to draw resamples from; add sizes or seeds")
