"""Means over seeds and their intervals, against scipy's Student distribution."""

import numpy as np
import pytest
from scipy import stats

from lmtrain.scaling import holm, mean_of
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
    assert (mean.value, mean.half, mean.count, mean.p_value) == (-2.0, None, 1, None)


@pytest.mark.parametrize("values", [[-0.1, -0.11, -0.09], [-0.1, 0.1, 0.05], [3.0, 4.0]])
def test_the_p_value_is_scipys(values: list[float]) -> None:
    assert mean_of(values).p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)


def test_values_that_are_all_equal() -> None:
    assert mean_of([0.5, 0.5]).p_value == 0
    assert mean_of([0.0, 0.0]).p_value == 1


def test_holms_rule_keeps_a_family_below_its_level() -> None:
    """By definition: the least p of n counts n times, the next n - 1 times, and none less than one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    generator = np.random.default_rng(1)
    families = generator.standard_normal((300, 8, 4))  # where no difference is true
    wrong = sum(min(holm([mean_of(values).p_value for values in family])) < 0.05 for family in families)
    assert 3 <= wrong <= 27  # 5 % of 300; beyond four standard deviations
