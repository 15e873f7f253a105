"""`torchrun -m lmtrain train ...`: the same run as without; the truth about it is in status.json."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmtrain.run import read_metrics, read_status
from lmtrain.train import DONE, train
from tests.lmtrain import tiny
from tests.processes import SECONDS, begin, wait_until


def torchrun(folder: Path, *words: str) -> "subprocess.Popen[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return begin(
        [*launcher, "lmtrain", "train", str(tiny.write(folder)), *tiny.settings(folder), *words],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_run_is_that_of_one_process(tmp_path: Path) -> None:
    text, _ = (launched := torchrun(tmp_path, "train.micro_batch=1")).communicate(timeout=SECONDS)
    assert launched.returncode == 0, text
    assert text.count("done: ") == text.count("step 12/12") == 1
    alone = tmp_path / "alone"
    assert train(tiny.config(tmp_path, "train.micro_batch=1", f"run.dir={alone}")) == DONE
    for row, other in zip(read_metrics(tmp_path / "run"), read_metrics(alone), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-6)


@pytest.mark.fault(7)
def test_sigterm_to_the_launcher_saves_once_and_the_same_command_goes_on(tmp_path: Path) -> None:
    launched = torchrun(tmp_path, "train.steps=100000", "eval.every=0", "checkpoint.every=100000")
    rows = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: launched.poll() is not None or (rows.exists() and rows.read_text().count("\n") >= 3))
    assert launched.poll() is None
    launched.send_signal(signal.SIGTERM)
    text, _ = launched.communicate(timeout=SECONDS)
    assert launched.returncode != 0
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.reason) == ("stopped", "SIGTERM"), text
    assert status.checkpoint == f"checkpoints/step-{status.step}"
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == [f"step-{status.step}"]
    assert read_metrics(tmp_path / "run")[-1]["step"] == status.step


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    text, _ = (launched := torchrun(tmp_path, "train.batch_tokens=96")).communicate(timeout=SECONDS)
    assert launched.returncode != 0
    assert text.count("train.batch_tokens=96: not a multiple of data.seq_len 32 x ranks 2; nearest: 128") == 1
    assert not (tmp_path / "run").exists()
