"""What a law may look like, and the runs that it is fitted to.

Every form is linear in its coefficients once its exponents are chosen. N and D are centred at their geometric means,
so that coefficients stay near the loss whatever the exponents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

LEAST_DISTINCT = 4
"""Sizes, and token counts, below which E, A and a (E, B and b) are not three numbers but a guess."""
SAME = 0.01
"""Sizes (token counts, sparsities) that differ by less than this share count as one."""


@dataclass(frozen=True)
class Points:
    """Runs as a fit sees them, [n] each: N, D, loss > 0, rho >= 1 (1: nothing left out), and the group of each.

    Runs of one group share a trunk, and with it their luck: a bootstrap draws them together.
    """

    N: Array
    D: Array
    loss: Array
    rho: Array
    group: NDArray[Any]

    @classmethod
    def of(
        cls,
        N: ArrayLike,
        D: ArrayLike,
        loss: ArrayLike,
        rho: ArrayLike | None = None,
        group: Sequence[str] | None = None,
    ) -> Points:
        """From anything like arrays; without groups every run is its own. ValueError names what is no number > 0."""
        columns = {"N": N, "D": D, "loss": loss, "rho": np.ones(np.size(loss)) if rho is None else rho}
        arrays = {name: np.asarray(values, dtype=float).ravel() for name, values in columns.items()}
        groups = np.arange(arrays["loss"].size).astype(str) if group is None else np.asarray(group, dtype=str)
        for name, values in arrays.items():
            if values.size != groups.size:
                raise ValueError(f"{name}: {values.size} numbers for {groups.size} runs")
            if not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(f"{name}: {values[~(np.isfinite(values) & (values > 0))][0]} is no number > 0")
        return cls(**arrays, group=groups)

    def __len__(self) -> int:
        return self.loss.size

    def __getitem__(self, some: NDArray[Any]) -> Points:
        return Points(self.N[some], self.D[some], self.loss[some], self.rho[some], self.group[some])

    @property
    def centre(self) -> tuple[float, float]:
        """Logarithms of the geometric means of N and D."""
        return float(np.log(self.N).mean()), float(np.log(self.D).mean())


def distinct(values: Array) -> int:
    """How many numbers there are; those within `SAME` of the one before count once."""
    return 1 + int((np.diff(np.log(np.sort(values))) > SAME).sum()) if values.size else 0


Columns = Callable[[Array, Array, Array, Array], list[Array]]
"""(exponents [..., k, 1]; ln N, ln D, both centred, and ln rho, each [n]) -> columns, each [..., n] or [n]"""


@dataclass(frozen=True)
class Form:
    """A family of laws. The first three coefficients are E, A, B >= 0; a further one has any sign.

    grid: for each exponent the values at which the search begins.
    """

    formula: str
    exponents: tuple[str, ...]
    coefficients: tuple[str, ...]
    columns: Columns
    grid: tuple[Array, ...]

    def matrix(self, exponents: Array, points: Points, centre: tuple[float, float]) -> Array:
        """[..., k] -> [..., n, m]: what the coefficients multiply."""
        x, y, z = np.log(points.N) - centre[0], np.log(points.D) - centre[1], np.log(points.rho)
        columns = self.columns(exponents[..., None], x, y, z)
        shape = np.broadcast_shapes(*(column.shape for column in columns))
        return np.stack([np.broadcast_to(column, shape) for column in columns], axis=-1)

    @property
    def unknowns(self) -> int:
        """How many numbers are fitted."""
        return len(self.exponents) + len(self.coefficients)

    @property
    def names(self) -> list[str]:
        """The numbers that the formula shows."""
        return [*self.coefficients, *("g" if name == "h" else name for name in self.exponents)]


def _plain(e: Array, x: Array, y: Array, z: Array) -> list[Array]:
    return [np.ones_like(x), np.exp(-e[..., 0, :] * x), np.exp(-e[..., 1, :] * y)]


def _effective(e: Array, x: Array, y: Array, z: Array) -> list[Array]:
    return [np.ones_like(x), np.exp(e[..., 2, :] * z - e[..., 0, :] * x), np.exp(-e[..., 1, :] * y)]


def _logarithm(e: Array, x: Array, y: Array, z: Array) -> list[Array]:
    return [*_plain(e, x, y, z), z]


_POWERS = np.geomspace(0.03, 1.8, 24)
_FEW = np.geomspace(0.03, 1.8, 14)

PLAIN = Form("L = E + A N^-a + B D^-b", ("a", "b"), ("E", "A", "B"), _plain, (_POWERS, _POWERS))
EFFECTIVE = Form(  # h = a g is searched: rho^h moves the loss alike whatever a is
    "L = E + A (N rho^-g)^-a + B D^-b",
    ("a", "b", "h"),
    ("E", "A", "B"),
    _effective,
    (_FEW, _FEW, np.linspace(-1, 1, 9)),
)
LOGARITHM = Form("L = E + A N^-a + B D^-b + c ln rho", ("a", "b"), ("E", "A", "B", "c"), _logarithm, (_POWERS, _POWERS))
