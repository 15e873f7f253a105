"""What happens around a run: a disk that fills up, a clock that jumps, another locale, a TensorBoard that fails."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import pytest

from lmtrain import checkpoint
from lmtrain.event_file import EventFile
from lmtrain.run import read_metrics, read_status
from lmtrain.train import DONE, STOPPED, train
from tests.lmtrain import tiny
from tests.lmtrain.test_train import assert_same
from tests.processes import SECONDS


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(tiny.config(folder)) == DONE
    return folder / "run"


SMALL_DISK = """
mount -t tmpfs -o size=4m none {disk}
"$@" 2> {folder}/said &
until [ "$(cut -d' ' -f3 /proc/$!/stat)" = T ]; do sleep 0.1; done
head -c 4m /dev/zero > {disk}/other
kill -CONT $!
wait $!
code=$?
cp -r {disk}/run {folder}/kept
exit $code
"""
"""A run on a disk of 4 MB, which somebody else fills while the run stands still."""


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


@pytest.mark.fault(12)
@pytest.mark.skipif(
    not _may_mount(), reason="needs unshare, and the right to mount a tmpfs in a namespace of one's own"
)
def test_a_disk_that_somebody_else_fills(undisturbed: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "lmtrain", "train", str(tiny.write(tmp_path))]
    settings = [*tiny.settings(tmp_path), f"run.dir={disk}/run", "checkpoint.keep=1"]
    script = SMALL_DISK.format(disk=disk, folder=tmp_path)
    environment = {**os.environ, "LMTRAIN_FAULT": "step=6:stall"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command, *settings], env=environment, timeout=SECONDS
    )
    said, kept = (tmp_path / "said").read_text(), tmp_path / "kept"
    assert done.returncode == 1, said
    for step in (8, 12):
        assert (
            f"no checkpoint at step {step}: {disk}/run/checkpoints/step-{step} could not be written: No space" in said
        )
    assert "bytes are free; it needs" in said
    assert "step 12/12" in said, "training went on"
    assert checkpoint.newest(kept / "checkpoints") == (kept / "checkpoints/step-4", [])
    assert sorted(path.name for path in (kept / "checkpoints").iterdir()) == ["latest", "step-4"]
    shutil.copytree(kept, tmp_path / "run")
    assert train(tiny.config(tmp_path, "checkpoint.keep=1")) == DONE  # where there is room
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(12)
def test_a_log_that_the_disk_refuses(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/status.json").write_text("{}")
    (tmp_path / "run/log.txt").symlink_to("/dev/full")
    assert train(tiny.config(tmp_path)) == DONE
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(12)
def test_progress_that_goes_into_a_file_on_a_full_disk(undisturbed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmtrain", "train", str(tiny.write(tmp_path)), *tiny.settings(tmp_path)]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stderr=full, timeout=SECONDS).returncode == DONE
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(18)
def test_a_clock_that_runs_backwards(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an hour whenever somebody looks; the run is stopped and goes on earlier than it began."""
    now, hours = time.time(), count()
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int((now - 3600 * next(hours)) * 1e9))
    monkeypatch.setenv("LMTRAIN_FAULT", "step=6:term")
    for code in (STOPPED, DONE):
        assert train(tiny.config(tmp_path, "log.tensorboard=true")) == code
    assert next(hours) > 0, "somebody looked"
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(18)
@pytest.mark.parametrize(("name", "helped"), [("läuft", ""), ("runs", "0")])
def test_another_hash_seed_and_the_locale_c(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, helped: str
) -> None:
    """With a letter that this locale does not have: in names, or in a file where Python does not help out of it."""
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONHASHSEED", "4711")
    monkeypatch.setenv("PYTHONUTF8", helped)
    monkeypatch.setenv("PYTHONCOERCECLOCALE", helped)
    folder = tmp_path / name
    folder.mkdir()
    path = tiny.write(folder)
    path.write_text("# läuft\n" + path.read_text(), encoding="utf-8")
    running = tiny.command(folder)
    said, _ = running.communicate(timeout=SECONDS)
    assert running.returncode == DONE, said
    assert_same(folder / "run", undisturbed)


@pytest.mark.fault(17)
def test_a_tensorboard_that_fails_at_step_6(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = EventFile.scalars

    def scalars(self: EventFile, values: Mapping[str, float], step: int) -> None:
        if step == 6:
            raise OSError(28, os.strerror(28))
        real(self, values, step)

    monkeypatch.setattr(EventFile, "scalars", scalars)
    assert train(tiny.config(tmp_path, "log.tensorboard=true")) == DONE
    assert capsys.readouterr().err.count("TensorBoard stopped (OSError: [Errno 28] No space left on device)") == 1
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(17)
def test_curves_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = tiny.command(tmp_path, "log.tensorboard=true", fault="step=7:kill")
    assert killed.wait(SECONDS) == -signal.SIGKILL
    assert train(tiny.config(tmp_path, "log.tensorboard=true")) == DONE
    told = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for tag, wanted in {"train/loss": range(1, 13), "eval/text/loss": (4, 8, 12)}.items():
        assert [event.step for event in told.Scalars(tag)] == list(wanted)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "split" not in row]
    assert [event.value for event in told.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "done"
