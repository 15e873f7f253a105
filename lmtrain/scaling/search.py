"""Variable projection: coefficients follow from exponents by least squares, and only exponents are searched.

Residuals are relative, 1 - predicted / measured. Many weightings of the same runs are fitted at once, which is what a
bootstrap asks for; leading dimensions [R] below are these.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from lmtrain.scaling.forms import Array, Form, Points

LEAST, MOST = 1e-3, 4.0
"""Bounds of a and b."""
FIRST_STEP, LAST_STEP = 0.1, 1e-7
RIDGE = 1e-13  # of a column's own square: keeps equal columns solvable, moves no result that anybody reads
SOLUTIONS = 20000  # of a grid at a time, so that it fits into memory


@dataclass(frozen=True)
class Laws:
    """R laws of one form: exponents [R, k], coefficients [R, m] of centred N and D, mean squared residuals [R]."""

    form: Form
    centre: tuple[float, float]
    exponents: Array
    coefficients: Array
    error: Array

    def at(self, points: Points) -> Array:
        """Predicted losses, [R, n]. Beyond the runs they mean nothing without their interval."""
        return _predict(self.form.matrix(self.exponents, points, self.centre), self.coefficients)

    def values(self, name: str) -> Array:
        """[R] of: a coefficient of N and D themselves, an exponent, `g`, or `n*`: b / (a + b)."""
        form = self.form
        if name in form.exponents:
            return self.exponents[:, form.exponents.index(name)]
        a, b = self.exponents[:, 0], self.exponents[:, 1]
        if name == "n*":  # what the loss does not depend on deserves no FLOPs
            return np.where(self.coefficients[:, 1] == 0, 0.0, np.where(self.coefficients[:, 2] == 0, 1.0, b / (a + b)))
        if name == "g":
            return self.values("h") / a
        lifted = {"A": np.exp(a * self.centre[0]), "B": np.exp(b * self.centre[1])}
        return self.coefficients[:, form.coefficients.index(name)] * lifted.get(name, 1.0)

    def best_size(self, C: float, factor: float) -> Array:
        """[R]: N of the least loss that C = factor N D FLOPs can buy, at sparsity 1."""
        a, b, A, B = (self.values(name) for name in "abAB")
        with np.errstate(divide="ignore"):
            return np.asarray((a * A / (b * B)) ** (1 / (a + b)) * (C / factor) ** (b / (a + b)))


def search(
    form: Form,
    points: Points,
    weights: Array,
    start: Array | None = None,
    centre: tuple[float, float] | None = None,
    last_step: float = LAST_STEP,
) -> Laws:
    """The best law for each weighting of the runs, [R, n].

    start: exponents [k] to begin at; without, the best of the form's grid. last_step: how finely exponents are found.
    """
    centre = centre or points.centre
    exponents = np.stack([_best_of_grid(form, points, w, centre) for w in weights]) if start is None else start
    exponents = np.array(np.broadcast_to(exponents, (len(weights), len(form.exponents))))
    error = _solve(form, points, exponents, weights, centre)[1]
    step = np.full(len(weights), FIRST_STEP)
    directions = np.array([d for d in itertools.product((-1.0, 0.0, 1.0), repeat=exponents.shape[1]) if any(d)])
    while (going := np.flatnonzero(step > last_step)).size:
        around = _bounded(exponents[going, None] + step[going, None, None] * directions)
        errors = _solve(form, points, around, weights[going, None], centre)[1]
        best = errors.argmin(1)
        each = np.arange(going.size)
        better = errors[each, best] < error[going]
        exponents[going[better]] = around[each, best][better]
        error[going[better]] = errors[each, best][better]
        step[going] = np.where(better, np.minimum(1.6 * step[going], FIRST_STEP), step[going] / 3)
    coefficients, error = _solve(form, points, exponents, weights, centre)
    return Laws(form, centre, exponents, coefficients, error / weights.sum(-1))


def _best_of_grid(form: Form, points: Points, weights: Array, centre: tuple[float, float]) -> Array:
    grid = np.stack(np.meshgrid(*form.grid, indexing="ij"), axis=-1).reshape(-1, len(form.grid))
    parts = np.array_split(grid, max(1, grid.shape[0] * len(points) // (SOLUTIONS * 50) + 1))
    errors = np.concatenate([_solve(form, points, part, weights, centre)[1] for part in parts])
    return np.asarray(grid[errors.argmin()])


def _bounded(exponents: Array) -> Array:
    exponents[..., :2] = exponents[..., :2].clip(LEAST, MOST)
    return exponents


def _solve(
    form: Form, points: Points, exponents: Array, weights: Array, centre: tuple[float, float]
) -> tuple[Array, Array]:
    """(coefficients [..., m] with E, A, B >= 0, weighted sum of squared residuals [...]) of exponents [..., k]."""
    X = form.matrix(exponents, points, centre) / points.loss[:, None]
    weights = np.broadcast_to(weights, X.shape[:-1])
    WX = X * weights[..., None]
    gram, target = np.swapaxes(X, -1, -2) @ WX, WX.sum(-2)
    coefficients = _nonnegative(gram, target, X, weights)
    return coefficients, _error(X, coefficients, weights)


def _nonnegative(gram: Array, target: Array, X: Array, weights: Array) -> Array:
    """Least squares with the first three coefficients >= 0: that of all columns, else the best of fewer."""
    coefficients = _of_columns(gram, target, list(range(gram.shape[-1])))
    bad = (coefficients[..., :3] < 0).any(-1)
    if bad.any():
        some = (gram[bad], target[bad])
        best, least = np.zeros_like(coefficients[bad]), np.full(bad.sum(), np.inf)
        free = range(3, gram.shape[-1])
        for size in (1, 2):
            for support in itertools.combinations(range(3), size):
                found = _of_columns(*some, [*support, *free])
                error = np.where((found[..., :3] < 0).any(-1), np.inf, _error(X[bad], found, weights[bad]))
                best[error < least], least = found[error < least], np.minimum(error, least)
        coefficients[bad] = best
    return coefficients


def _of_columns(gram: Array, target: Array, columns: list[int]) -> Array:
    """Least squares over these columns, 0 elsewhere."""
    part = gram[..., columns, :][..., columns] * (1 + RIDGE * np.eye(len(columns)))
    solution = np.zeros_like(target)
    solution[..., columns] = np.linalg.solve(part, target[..., columns, None])[..., 0]
    return solution


def _error(X: Array, coefficients: Array, weights: Array) -> Array:
    """From residuals, not from the normal equations, which lose half of the digits."""
    return np.asarray((weights * (1 - _predict(X, coefficients)) ** 2).sum(-1))


def _predict(X: Array, coefficients: Array) -> Array:
    return (X @ coefficients[..., None])[..., 0]
