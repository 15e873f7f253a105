"""What a person sees, on a terminal and elsewhere; that TensorBoard's failure is nobody else's; signals."""

import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lmtrain.board import Board
from lmtrain.event_file import EventFile
from lmtrain.progress import Pace, Progress, si, step_line
from lmtrain.signals import StopRequest

ROW: dict[str, Any] = {
    "step": 1200, "loss": 1.83, "lr": 9.1e-4, "grad_norm": 0.42, "tokens_per_second": 41234.0, "skipped": 0,
    "causality": "strict",
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_only_what_is_logged_is_shown_line_by_line() -> None:
    stream, kept = io.StringIO(), []
    progress = Progress(stream, kept.append)
    progress.update("step 1", logged=True)
    progress.update("step 2", logged=False)
    progress.note("validation")
    assert stream.getvalue() == "step 1\nvalidation\n"
    assert kept == ["step 1", "validation"]


def test_on_a_terminal_one_line_lives_and_notes_stay() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress.update("a long line", logged=False)
    progress.update("short", logged=True)
    progress.note("stays")
    shown = stream.getvalue()
    assert shown.startswith("\ra long line\rshort      ")
    assert shown.endswith("\rstays\n") or shown.endswith("\r" + "stays\n")


def test_a_line_says_what_design_promises() -> None:
    pace = Pace(5000, 2.64, 3.1e14, 1e15, 2.1e9, 760)
    line = step_line(ROW, pace)
    assert line == (
        "step 1200/5000  loss 1.8300  2.640 bpb  lr 9.1e-04  |g| 0.42  41.2k tok/s  31% mfu  2.1 GB  eta 0:12:40"
    )
    assert "310TFLOP/s" in step_line({**ROW, "skipped": 2}, Pace(5000, 2.64, 3.1e14, None, 2.1e9, 760))
    assert step_line({**ROW, "skipped": 2}, pace).endswith("skipped 2")
    ahead = step_line({**ROW, "causality": "selects_ahead"}, pace)
    assert ahead.startswith("step 1200/5000  loss 1.8300  2.640 bpb (both see ahead)  lr")


@pytest.mark.parametrize(
    ("number", "text"), [(0.5, "0.5"), (999.6, "1k"), (41234, "41.2k"), (2e9, "2G"), (1e18, "1e+03P")]
)
def test_prefixes(number: float, text: str) -> None:
    assert si(number) == text


@pytest.mark.fault(17)
def test_a_board_that_fails_complains_once_and_falls_silent(tmp_path: Path) -> None:
    complaints: list[str] = []
    (tmp_path / "file").write_text("")
    board = Board(tmp_path / "file", complaints.append)
    board.scalars({"train/loss": 1.0}, 1)
    board.close()
    assert len(complaints) == 1
    assert "goes on without it" in complaints[0]


@pytest.mark.fault(17)
def test_a_resumed_board_purges_what_was_beyond(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def complain(line: str) -> None:
        raise AssertionError(line)

    first = Board(tmp_path, complain)
    for step in range(1, 7):
        first.scalars({"train/loss": float(step)}, step)
    first.close()
    second = Board(tmp_path, complain, purge_step=4)
    second.scalars({"train/loss": 40.0}, 4)
    second.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.fault(17, 18)
@pytest.mark.parametrize("jump", [0, -3600, 0.25, 7])
def test_curves_go_on_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """Each of twelve starts takes back the step before it; its process has any number."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in range(12):
        monkeypatch.setattr(time, "time", lambda start=start: 1_800_000_000 + jump * start)
        monkeypatch.setattr(os, "getpid", lambda start=start: 1000 - 83 * start)
        file = EventFile(tmp_path, purge=start + 1)
        file.scalars({"loss": 1.0 + start, "lr": 0.5}, start + 1)
        file.scalars({"loss": -1.0}, start + 2)
        file.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    expected = [(step, float(step)) for step in range(1, 13)]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [*expected, (13, -1.0)]
    assert [event.step for event in read.Scalars("lr")] == list(range(1, 13))


@pytest.mark.fault(7)
def test_the_first_signal_is_remembered_and_the_second_has_its_usual_effect() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked()
        assert stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
