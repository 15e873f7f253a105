"""`deepspeed --hostfile hosts --module lmtrain train ...` trains as `lmtrain train ...` would."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main, parse
from lmtrain.run import read_status
from tests.lmtrain import tiny

SSH = """#!/bin/bash
# A stand-in: what should run on the host runs here.
while [[ "$1" == -* ]]; do shift 2; done; shift; eval "$@"
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_on_the_host_of_a_hostfile(tmp_path: Path) -> None:
    config = tiny.write(tmp_path)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    assert launcher is not None
    meet = ["--hostfile", str(tmp_path / "hosts"), "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    train = ["lmtrain", "train", str(config), *tiny.settings(tmp_path), "train.micro_batch=1"]
    done = subprocess.run(
        [sys.executable, launcher, *meet, "--module", *train],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_status(tmp_path / "run").state == "done"
    assert "step 12/12" in (tmp_path / "run/log.txt").read_text()


def test_the_launchers_own_word_is_not_ours(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert parse(["--local_rank=1", "train", "demo", "run.seed=2"]).overrides == ["run.seed=2"]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        main(["--local_rank=1", "train", "demo", "--speed"])
    assert stopped.value.code == 2
    assert capfd.readouterr().err == ""  # rank 0 says it
