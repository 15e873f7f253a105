"""Growth, prediction and crossover, on curves of which all is known."""

import math

import pytest

from lmtrain.bench.curves import Crossover, crossover, growth, predicted

LENGTHS = (1024, 2048, 4096, 8192)


def power(exponent: float, at_1024: float = 1.0) -> dict[int, float]:
    """at_1024 (T / 1024)^exponent."""
    return {length: at_1024 * (length / 1024) ** exponent for length in LENGTHS}


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5, 2.0])
def test_growth_is_the_exponent(exponent: float) -> None:
    assert growth(power(exponent, 0.3)) == pytest.approx(exponent, abs=1e-12)


def test_growth_fits_all_points_not_the_ends() -> None:
    assert growth({1: 1.0, 2: 4.0, 4: 4.0, 8: 8.0}) == pytest.approx(0.9)
    assert growth({1024: 1.0}) is None
    assert growth({}) is None


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.5])
def test_prediction_goes_on_along_the_line(exponent: float) -> None:
    curve = power(exponent)
    assert predicted(curve, 32768) == pytest.approx(32**exponent)


def test_prediction_is_cautious() -> None:
    assert predicted({}, 2048) is None
    assert predicted({1024: 3.0}, 4096) == pytest.approx(48.0)
    assert predicted(power(0.0), 16384) == pytest.approx(2.0)
    assert predicted({1024: 100.0, 2048: 1.0, 4096: 2.0}, 8192) == pytest.approx(4.0), "the last two points"


def test_curves_cross_where_powers_do() -> None:
    """4 T^1 meets T^2 at T = 4, in units of 1,024."""
    found = crossover(power(1.0, 4.5), power(2.0))
    assert found is not None
    assert (found.lengths, found.first) == (LENGTHS, 8192)
    assert found.crossing == pytest.approx(4.5 * 1024)
    assert str(found) == "8,192 (~4,608)"


def test_equal_at_a_length_is_not_faster_there() -> None:
    found = crossover(power(1.0, 2.0), power(2.0))
    assert found is not None
    assert found.first == 4096
    assert found.crossing == pytest.approx(2048)


def test_everywhere_and_nowhere() -> None:
    assert crossover(power(1.0, 0.9), power(2.0)) == Crossover(LENGTHS, 1024, None)
    assert crossover(power(2.0), power(1.0)) == Crossover(LENGTHS, None, None)
    assert str(Crossover(LENGTHS, 1024, None)) == "everywhere"
    assert str(Crossover(LENGTHS, None, None)) == "nowhere"


def test_a_lead_that_is_lost_again_does_not_count() -> None:
    ours, theirs = power(1.0), power(1.0, 2.0)
    ours[4096] = 100.0
    found = crossover(ours, theirs)
    assert found is not None
    assert found.first == 8192
    ours[8192] = 100.0
    found = crossover(ours, theirs)
    assert found is not None
    assert found.first is None


def test_only_common_lengths_are_compared() -> None:
    found = crossover({1024: 1.0, 4096: 5.0, 65536: 9.0}, {2048: 1.0, 4096: 6.0, 1024: 0.5})
    assert found is not None
    assert (found.lengths, found.first) == ((1024, 4096), 4096)
    share = math.log(2) / (math.log(2) + math.log(1.2))
    assert found.crossing == pytest.approx(1024 * 4**share)
    assert crossover({1024: 1.0}, {2048: 1.0}) is None
