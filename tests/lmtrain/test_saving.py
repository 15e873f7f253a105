"""Saves in a thread: what they write, that there is one at a time, and that whatever goes wrong in it is heard."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtrain import checkpoint, saving
from lmtrain.run import RunDirectory, read_metrics, read_status
from lmtrain.saving import Saver
from lmtrain.train import DONE, train
from parallel.world import ALONE
from tests.lmtrain import tiny
from tests.lmtrain.test_train import assert_same
from tests.processes import SECONDS

BACKGROUND = "checkpoint.asynchronous=true"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.open(tmp_path / "run") as run:
        yield run


class Gate:
    """Stands in for `checkpoint.save`: the real one, once the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.real, self.began = threading.Event(), checkpoint.save, threading.Semaphore(0)
        self.error: Exception | None = None
        self.at_work, self.most = 0, 0
        monkeypatch.setattr(saving.checkpoint, "save", self)

    def __call__(self, *words: Any, **names: Any) -> Path:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        self.began.release()
        assert self.open.wait(30)
        self.at_work -= 1
        if self.error:
            raise self.error
        return self.real(*words, **names)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def saver_of(run: RunDirectory, complaints: list[str] | None = None) -> Saver:
    said: list[str] = [] if complaints is None else complaints
    return Saver(run, ALONE, keep=2, background=True, complain=said.append)


def save(saver: Saver, step: int, tensors: dict[str, dict[str, Tensor]] | None = None) -> None:
    groups = tensors or {"model": {"x": torch.full((4,), float(step))}}
    saver.save(step, groups, {"step": step}, config="c", dataset="d")


def test_what_is_written_is_what_was_there_when_it_was_asked_for(run: RunDirectory, gate: Gate) -> None:
    x = torch.arange(6.0)
    groups = {"model": {"x": x, "tied": x.view(6), "y": torch.ones(2, dtype=torch.int64)}}
    with saver_of(run) as saver:
        save(saver, 1, groups)
        x.zero_()
        gate.open.set()
    kept = checkpoint.load(run.checkpoints / "step-1").tensors["model"]
    assert kept["x"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert kept["tied"] is kept["x"], "once on the disk, as without a thread"
    assert kept["y"].tolist() == [1, 1]


def test_one_at_a_time_and_the_status_follows(run: RunDirectory, gate: Gate) -> None:
    saver = saver_of(run)
    save(saver, 1)
    gate.began.acquire()
    saver.report()
    assert saver.saved_step == -1, "it is not written yet"
    assert run.status.checkpoint is None
    opener = threading.Timer(0.2, gate.open.set)
    opener.start()
    save(saver, 2)  # waits for the first
    assert saver.saved_step == 1
    assert run.status.checkpoint == "checkpoints/step-1"
    assert saver.has_saved(2)
    assert gate.most == 1
    for step in (3, 4):
        save(saver, step)
    assert saver.has_saved(4)
    assert [path.name for path in sorted(run.checkpoints.glob("step-*"))] == ["step-3", "step-4"], "two are kept"


@pytest.mark.fault(12)
def test_a_disk_that_refuses_is_heard_at_the_next_boundary(run: RunDirectory, gate: Gate) -> None:
    complaints: list[str] = []
    saver = saver_of(run, complaints)
    gate.error = checkpoint.CheckpointError(run.checkpoints / "step-1", 100, "no space left")
    gate.open.set()
    save(saver, 1)
    saver._thread.join()  # type: ignore[union-attr]
    assert complaints == []
    saver.report()
    assert "no checkpoint at step 1: " in complaints[0]
    assert "no space left" in complaints[0]
    assert not saver.has_saved(1)
    gate.error = None
    save(saver, 2)
    assert saver.has_saved(2)
    assert len(complaints) == 1


@pytest.mark.fault(12)
@pytest.mark.parametrize("background", [False, True])
def test_no_checkpoint_is_newer_than_a_row_that_waits_for_the_disk(run: RunDirectory, background: bool) -> None:
    """A process killed behind it would resume from the checkpoint, and the row would be gone."""
    complaints: list[str] = []
    saver = Saver(run, ALONE, keep=2, background=background, complain=complaints.append)
    metrics = run._metrics._descriptor
    there, full = os.dup(metrics), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, metrics)
    os.close(full)
    run.log_metrics({"step": 1})
    save(saver, 1)
    assert not saver.has_saved(1)
    assert not list(run.checkpoints.glob("step-*"))
    assert "no checkpoint at step 1: " in complaints[0]
    assert "No space left" in complaints[0]
    os.dup2(there, metrics)
    os.close(there)
    save(saver, 1)
    assert read_metrics(run.path) == [{"step": 1}]
    assert saver.has_saved(1)
    assert len(complaints) == 1


def test_a_bug_in_the_thread_ends_the_run(run: RunDirectory, gate: Gate) -> None:
    saver = saver_of(run)
    gate.error = KeyError("a bug")
    gate.open.set()
    save(saver, 1)
    saver._thread.join()  # type: ignore[union-attr]
    with pytest.raises(KeyError, match="a bug"):
        saver.report()


def test_old_checkpoints_that_stay_are_a_warning(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def retain(folder: Path, keep: int, verified: checkpoint.Verified) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(saving.checkpoint, "retain", retain)
    complaints: list[str] = []
    saver = saver_of(run, complaints)
    save(saver, 1)
    assert saver.has_saved(1)
    assert complaints == ["old checkpoints could not be removed: not yours"]


def test_who_fails_waits_for_the_save_in_flight_and_who_interrupts_does_not(run: RunDirectory, gate: Gate) -> None:
    def end(saver: Saver, step: int, how: BaseException) -> None:
        with saver:
            save(saver, step)
            raise how

    saver = saver_of(run)
    with pytest.raises(KeyboardInterrupt):
        end(saver, 1, KeyboardInterrupt())
    assert saver.saved_step == -1
    gate.open.set()
    with pytest.raises(ZeroDivisionError):
        end(saver, 2, ZeroDivisionError())
    assert saver.saved_step == 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(tiny.config(folder)) == DONE
    return folder / "run"


@pytest.mark.fault(2, 5)
def test_a_run_is_the_same_and_at_every_instant_a_checkpoint_verifies(undisturbed: Path, tmp_path: Path) -> None:
    folder, found, over = tmp_path / "run/checkpoints", [], threading.Event()

    def poll() -> None:
        while not over.is_set():
            newest, _ = checkpoint.newest(folder) if folder.is_dir() else (None, [])
            if newest is not None or found:
                found.append(newest)

    watcher = threading.Thread(target=poll)
    watcher.start()
    try:
        assert train(tiny.config(tmp_path, BACKGROUND, "checkpoint.every=1", "checkpoint.keep=1")) == DONE
    finally:
        over.set()
        watcher.join()
    assert found
    assert None not in found
    assert [path.name for path in folder.glob("step-*")] == ["step-12"]
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(2)
@pytest.mark.parametrize(
    "fault", ["save:before=commit", "save:before=latest", "save:before=retention", "save:bytes=90000"]
)
def test_kill_9_in_a_save(undisturbed: Path, tmp_path: Path, fault: str) -> None:
    killed = tiny.command(tmp_path, BACKGROUND, fault=fault)
    assert killed.wait(SECONDS) == -signal.SIGKILL, killed.stdout.read() if killed.stdout else ""
    assert train(tiny.config(tmp_path, BACKGROUND)) == DONE
    assert_same(tmp_path / "run", undisturbed)


def test_giving_up_names_the_checkpoint_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_FAULT", "step=5:grad=nan")
    train(tiny.config(tmp_path, BACKGROUND, "train.max_skips=1"))
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.checkpoint) == ("failed", "checkpoints/step-4")
