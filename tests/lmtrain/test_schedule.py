import math
from types import SimpleNamespace

import pytest

from lmtrain.schedule import learning_rate


def settings(**changes):
    defaults = {"lr": 1e-3, "schedule": "cosine", "warmup": 0.05, "final": 0.1, "decay": 0.2}
    return SimpleNamespace(**(defaults | changes))


def nanogpt(iteration, lr=1e-3, warmup_iters=100, lr_decay_iters=2000, min_lr=1e-4):
    """get_lr of nanoGPT's train.py, restated."""
    if iteration < warmup_iters:
        return lr * (iteration + 1) / (warmup_iters + 1)
    if iteration > lr_decay_iters:
        return min_lr
    share = (iteration - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * share)) * (lr - min_lr)


def test_cosine_is_nanogpts_at_every_step():
    for step in range(2100):
        assert learning_rate(step, 2000, settings()) == pytest.approx(nanogpt(step), rel=1e-14)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-3 / 101), (99, 1e-3 * 100 / 101), (100, 1e-3), (1050, 5.5e-4), (2000, 1e-4)],
)
def test_cosine_at_key_steps(step, expected):
    assert learning_rate(step, 2000, settings()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-3 / 101),
        (100, 1e-3),
        (1600, 1e-3),  # where the decay begins
        (1700, 1e-4 + 9e-4 * (1 - 0.5)),  # a quarter of it: sqrt(1/4)
        (1999, 1e-4 + 9e-4 * (1 - math.sqrt(399 / 400))),
        (2000, 1e-4),
    ],
)
def test_wsd_at_key_steps(step, expected):
    assert learning_rate(step, 2000, settings(schedule="wsd")) == pytest.approx(expected, rel=1e-12)


def test_wsd_is_flat_between_warm_up_and_decay():
    assert {learning_rate(step, 2000, settings(schedule="wsd")) for step in range(100, 1601)} == {1e-3}


def test_constant_stays_at_the_peak_after_warm_up():
    rates = [learning_rate(step, 2000, settings(schedule="constant")) for step in range(2000)]
    assert rates[0] == pytest.approx(1e-3 / 101)
    assert set(rates[100:]) == {1e-3}


def test_a_fork_of_a_stable_run_begins_at_the_rate_it_left():
    """Branching off a long wsd run at step 800 to end at step 1000: same rate there, then down."""
    trunk, fork = settings(schedule="wsd"), settings(schedule="wsd")
    assert learning_rate(800, 1000, fork) == learning_rate(800, 10_000, trunk)
    assert learning_rate(801, 1000, fork) < learning_rate(801, 10_000, trunk)
    assert learning_rate(1000, 1000, fork) == pytest.approx(1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 20, 333])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("warmup", "decay"), [(0, 0), (0, 0.2), (0, 1), (0.05, 0.2), (0.5, 0.2), (0.5, 1), (1, 0), (1, 0.2)]
)
def test_every_step_of_any_run_has_a_rate_up_to_the_peak(schedule, steps, warmup, decay, final):
    config = settings(schedule=schedule, warmup=warmup, decay=decay, final=final)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 1e-3 for rate in rates)
    warm = round(warmup * steps)
    assert rates[: warm + 1] == sorted(rates[: warm + 1])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    end = 1e-3 if schedule == "constant" else final * 1e-3
    assert learning_rate(steps, steps, config) == learning_rate(steps + 5, steps, config) == pytest.approx(end)


def test_twenty_steps_warm_up_for_one():
    assert [learning_rate(step, 20, settings()) for step in (0, 1)] == [5e-4, 1e-3]
