"""IsoFLOP parabolas: exact where losses are parabolas, biased where they are the law, silent without a minimum."""

import numpy as np
import pytest

from lmtrain.scaling import budgets, isoflop
from tests.lmtrain.sweep.made import hoffmann


def test_parabolas_are_found_again() -> None:
    C = np.repeat([1e15, 1e16], 5)
    best = np.repeat([1e6, 1e6 * 10**0.6], 5)
    N = best * np.tile(np.geomspace(0.3, 3, 5), 2)
    found = isoflop(N, C, 2 + 0.1 * np.log(N / best) ** 2)
    assert [p.best for p in found.parabolas] == pytest.approx([1e6, 1e6 * 10**0.6], rel=1e-6)
    assert found.exponent == pytest.approx(0.6)


def test_they_are_biased_even_without_noise() -> None:
    """The minimum of the parabola through losses of the law, sizes within a decade of the best, is no least loss."""
    C, a, b = 6 * 1e8 * 1e9, 0.3392, 0.2849
    best = (a * 406.4 / (b * 410.7)) ** (1 / (a + b)) * (C / 6) ** (b / (a + b))
    N = best * np.geomspace(0.1, 10, 9)
    (parabola,) = isoflop(N, np.full(9, C), np.array([hoffmann(n, C / 6 / n) for n in N])).parabolas
    assert parabola.best is not None
    assert abs(parabola.best / best - 1) > 0.01


def test_a_minimum_outside_of_the_sizes_is_none() -> None:
    N = np.geomspace(1e6, 1e7, 4)
    found = isoflop(N, np.full(4, 1e15), 2 + 0.1 * np.log(N / 1e8) ** 2)
    assert (found.parabolas[0].best, found.exponent) == (None, None)


def test_budgets_hold_what_costs_about_the_same() -> None:
    C = np.array([1e15, 5e15, 1.05e15, 5.2e15, 1e17])
    assert [sorted(group.tolist()) for group in budgets(C)] == [[0, 2], [1, 3], [4]]
