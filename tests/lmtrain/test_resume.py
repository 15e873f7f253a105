"""However and whenever a run is stopped, the same command makes of it the run that nobody disturbed."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import lmtrain.train
from lmtrain import checkpoint
from lmtrain.run import read_metrics, read_status
from lmtrain.train import DONE, STOPPED, train
from tests.lmtrain import tiny
from tests.lmtrain.test_train import assert_same
from tests.processes import SECONDS

SITUATIONS: dict[str, tuple[list[str], str]] = {
    "within an epoch": ([], "step=7:term"),
    "across an epoch": (["train.batch_tokens=512"], "step=5:term"),  # 103 windows of text, 16 of them in a step
    "while gradients accumulate": (["train.micro_batch=1"], "step=7:term"),
    "after an evaluation": (["eval.every=1"], "step=6:term"),
    "with a save in a thread": (["checkpoint.asynchronous=true", "checkpoint.every=1"], "step=6:term"),
    "at every step": (["train.steps=5"], ",".join(f"step={step}:term" for step in range(1, 5))),
}


@pytest.mark.fault(5)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_stopped_and_resumed(situation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, batches, parameters and moments; with dropout."""
    settings, faults = SITUATIONS[situation]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    assert train(tiny.config(tmp_path / "whole", *settings)) == DONE
    monkeypatch.setenv("LMTRAIN_FAULT", faults)
    for _ in faults.split(","):
        assert train(tiny.config(tmp_path / "stopped", *settings)) == STOPPED
    assert train(tiny.config(tmp_path / "stopped", *settings)) == DONE
    last = read_metrics(tmp_path / "whole/run")[-1]["step"]
    assert_same(tmp_path / "stopped/run", tmp_path / "whole/run", last)


def test_the_epoch_is_over_before_the_run(tmp_path: Path) -> None:
    """What "across an epoch" above rests on."""
    assert train(tiny.config(tmp_path, *SITUATIONS["across an epoch"][0], "train.steps=5")) == DONE
    state = checkpoint.load(tmp_path / "run/checkpoints/step-5").state
    windows = (len((tmp_path / "text.txt").read_bytes()) - 32) // 32
    assert state["samples"] < windows < 12 * 16


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(tiny.config(folder)) == DONE
    return folder / "run"


@pytest.mark.fault(7)
def test_sigterm_before_the_first_step(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lmtrain.train.build_data

    def asked_to_stop(config: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(config)

    with monkeypatch.context() as patched:
        patched.setattr(lmtrain.train, "build_data", asked_to_stop)
        assert train(tiny.config(tmp_path)) == STOPPED
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.step, status.checkpoint) == ("stopped", 0, "checkpoints/step-0")
    assert train(tiny.config(tmp_path)) == DONE
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(7)
@pytest.mark.parametrize("point", ["commit", "latest", "retention"])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_sigterm_in_a_save(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, asynchronous: str
) -> None:
    asked = []

    def before(now: str) -> None:
        if now == point and not asked:
            asked.append(now)
            os.kill(os.getpid(), signal.SIGTERM)

    settings = [f"checkpoint.asynchronous={asynchronous}"]
    with monkeypatch.context() as patched:
        patched.setattr("lmtrain.fault.before", before)
        assert train(tiny.config(tmp_path, *settings)) == STOPPED
    step = read_metrics(tmp_path / "run")[-1]["step"]
    assert checkpoint.newest(tmp_path / "run/checkpoints") == (tmp_path / f"run/checkpoints/step-{step}", [])
    assert train(tiny.config(tmp_path, *settings)) == DONE
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(7)
def test_a_second_signal_ends_it_at_once(undisturbed: Path, tmp_path: Path) -> None:
    """Both wait for a process that stands still in step 6, and come before it gets to the end of the step."""
    running = tiny.command(tmp_path, fault="step=6:stall")
    _, how = os.waitpid(running.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(how)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        running.send_signal(number)
    running.communicate(timeout=SECONDS)
    assert running.returncode == -signal.SIGTERM
    assert checkpoint.newest(tmp_path / "run/checkpoints") == (tmp_path / "run/checkpoints/step-4", [])
    assert train(tiny.config(tmp_path)) == DONE
    assert_same(tmp_path / "run", undisturbed)
