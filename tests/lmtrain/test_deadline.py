"""A run with a time limit ends before it, with a checkpoint of all that it did, and goes on from there."""

import time
from pathlib import Path

import pytest

from lmtrain.config import ConfigError
from lmtrain.deadline import SECONDS_TO_END, SLOW_DISK, Deadline, seconds_of
from lmtrain.run import read_metrics, read_status
from lmtrain.train import DONE, STOPPED, train
from tests.lmtrain import tiny
from tests.lmtrain.test_rank_faults import run as run_ranks
from tests.processes import SECONDS


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3600", 3600), ("90s", 90), ("1h30m", 5400), ("2d", 172800), ("1d2h3m4s", 93784), ("5m", 300), ("007", 7)],
)
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0h", "1h 30m", "30m1h", "1.5h", "-1", "h", "1:30:00", "inf", "9" * 30, "१h"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        seconds_of(text)


def test_a_limit_that_is_none_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_time=soon: 'soon' must be a time"):
        tiny.config(tmp_path, "train.max_time=soon")


class Clock:
    """Says what it is told to."""

    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_it_is_near_when_a_slow_step_and_save_might_not_fit() -> None:
    clock = Clock()
    deadline = Deadline(100.0, clock)
    deadline.expect_save(int(3 * SLOW_DISK))
    for seconds in (1.0, 2.0, 1.5):
        deadline.took_step(seconds)
    deadline.took_save(5.0)
    for at, near in ((84.9, False), (85.1, True), (200.0, True)):
        clock.time = at
        assert deadline.is_near() == near
    assert deadline.reserve == 2 * (2.0 + 5.0) + SECONDS_TO_END


def test_a_save_that_nobody_timed_is_as_slow_as_the_disk() -> None:
    deadline = Deadline(100.0, Clock())
    deadline.expect_save(int(30 * SLOW_DISK))
    assert deadline.reserve == 60 + SECONDS_TO_END


def test_the_first_step_is_forgotten() -> None:
    deadline = Deadline(100.0, Clock())
    for seconds in (40.0, *[1.0] * 20):
        deadline.took_step(seconds)
    assert deadline.reserve == 2 + SECONDS_TO_END


def test_no_limit_is_never_near() -> None:
    clock = Clock()
    clock.time = 1e12
    assert not Deadline(None, clock).is_near()


def assert_stopped(run: Path) -> int:
    """By the limit, with a checkpoint of the last step; which it was."""
    status = read_status(run)
    assert status is not None
    assert (status.state, status.reason) == ("stopped", "train.max_time")
    last = max((row["step"] for row in read_metrics(run)), default=0)
    assert (status.step, status.checkpoint) == (last, f"checkpoints/step-{last}")
    return last


@pytest.mark.fault(8)
def test_a_run_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    words = ["train.steps=100000", "eval.every=0", "checkpoint.every=100000"]
    began = time.monotonic()
    assert train(tiny.config(tmp_path, *words, "train.max_time=4")) == STOPPED
    assert time.monotonic() - began < 4
    first = assert_stopped(tmp_path / "run")
    assert first > 0
    assert train(tiny.config(tmp_path, *words, "train.max_time=4s", "checkpoint.asynchronous=true")) == STOPPED
    assert assert_stopped(tmp_path / "run") > first


@pytest.mark.fault(8)
def test_a_limit_that_leaves_no_time_stops_before_the_first_step(tmp_path: Path) -> None:
    assert train(tiny.config(tmp_path, "train.max_time=1")) == STOPPED
    assert assert_stopped(tmp_path / "run") == 0
    assert train(tiny.config(tmp_path)) == DONE


@pytest.mark.fault(8)
def test_an_evaluation_that_would_take_too_long_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lmtrain.train as module

    clock = Clock()
    monkeypatch.setattr(module, "Deadline", lambda seconds: Deadline(seconds, clock))
    real = module.validate

    def slow(*words: object, **names: object) -> object:
        clock.time = 4000.0
        return real(*words, **names)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "validate", slow)
    assert train(tiny.config(tmp_path, "train.max_time=1h")) == STOPPED
    assert assert_stopped(tmp_path / "run") == 4


@pytest.mark.fault(8)
def test_all_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    words = ["train.steps=100000", "eval.every=0", "train.max_time=4"]
    assert run_ranks(tmp_path, *words) == [STOPPED, STOPPED]
    assert_stopped(tmp_path / "run")


@pytest.mark.fault(8)
def test_the_command_exits_with_75(tmp_path: Path) -> None:
    command = tiny.command(tmp_path, "train.steps=100000", "eval.every=0", "train.max_time=3")
    text, _ = command.communicate(timeout=SECONDS)
    assert command.returncode == STOPPED, text
    assert "stopped by train.max_time" in text
