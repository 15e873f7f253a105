"""Means over seeds and their intervals, against scipy's Student distribution."""

import numpy as np
import pytest
from scipy import stats

from lmtrain.scaling import mean_of
from lmtrain.scaling.seeds import student


@pytest.mark.parametrize("freedom", [*range(1, 12), 30, 101, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_students_quantile(freedom: int, confidence: float) -> None:
    assert student(freedom, confidence) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9)


def test_the_interval_is_scipys() -> None:
    values = [1.2, 1.5, 0.9, 1.1]
    mean = mean_of(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (mean.value - mean.half, mean.value + mean.half) == pytest.approx((low, high))


def test_one_value_has_no_interval() -> None:
    mean = mean_of([-2.0])
    assert (mean.value, mean.half, mean.count, mean.beyond_chance) == (-2.0, None, 1, False)


def test_what_chance_may_do() -> None:
    assert mean_of([-0.1, -0.11, -0.09]).beyond_chance
    assert not mean_of([-0.1, 0.1, 0.05]).beyond_chance
