"""The script of a Slurm job: it asks for what was said, and trains what `lmtrain train` would, resumed if run again."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from lmtrain.run import read_metrics, read_status
from tests.lmtrain import tiny


def write(folder: Path, *words: str, overrides: tuple[str, ...] = ()) -> int:
    config = tiny.write(folder)
    out = ["--out", str(folder / "job.slurm")]
    return main(["launch", "slurm", str(config), *tiny.settings(folder), *overrides, *out, *words])


def test_it_asks_for_what_was_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "2", "--processes", "2", "--gpus", "--time", "1-12", "--option=--partition=long"]
    assert write(tmp_path, *words, overrides=("train.micro_batch=1",)) == 0
    assert "4 processes" in capsys.readouterr().out
    lines = (tmp_path / "job.slurm").read_text().splitlines()
    asked = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--time=1-12", "--partition=long"]
    assert {f"#SBATCH {option}" for option in asked} <= set(lines)
    assert lines[0] == "#!/bin/bash"
    assert os.access(tmp_path / "job.slurm", os.X_OK)


def test_words_are_quoted_for_the_shell(tmp_path: Path) -> None:
    assert write(tmp_path, overrides=("model.mixers.far={kind: dense, heads: 2}", "run.dir=$(touch pwned) 'x'")) == 0
    text = (tmp_path / "job.slurm").read_text()
    last = text[text.index("-m lmtrain train ") :]
    assert "model.mixers.far={kind: dense, heads: 2}" in shlex.split(last)
    assert "run.dir=$(touch pwned) 'x'" in shlex.split(last)
    assert "#SBATCH --job-name=--touch-pwned---x-" in text
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.slurm")], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--processes", "3"], ["train.batch_tokens=128", "ranks 3"]),
        (["--time", "soon", "--option=partition"], ["--time 'soon'", "--option 'partition'"]),
        (["--option=--a\n#SBATCH --b"], ["--option"]),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(tmp_path, *words) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in expected)
    assert not (tmp_path / "job.slurm").exists()


def test_no_script_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.slurm").write_text("mine")
    assert write(tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "job.slurm").read_text() == "mine"


def command(folder: Path, name: str, body: str) -> None:
    """A stand-in for a command of Slurm's."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_the_script_trains_on_all_processes_and_goes_on_when_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for scontrol, sbatch and an srun that starts the one task of a single node."""
    command(tmp_path, "scontrol", "echo localhost; sleep 0.3; echo elsewhere")
    command(tmp_path, "srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    command(tmp_path, "python", f'exec {shlex.quote(sys.executable)} "$@"')
    command(tmp_path, "sbatch", 'SLURM_JOB_ID=$$ SLURM_JOB_NODELIST=n bash "$1" 1>&2 && echo "Submitted batch job $$"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    overrides = ("train.micro_batch=1", "train.max_skips=3")
    assert write(tmp_path, "--processes", "2", "--submit", overrides=overrides) == 0
    assert "Submitted batch job" in capsys.readouterr().out
    run = tmp_path / "run"
    assert [row["step"] for row in read_metrics(run) if "batch" in row] == list(range(1, 13))
    assert read_status(run).state == "done"


def test_without_slurm_the_script_is_written_and_the_user_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert write(tmp_path, "--submit") == 2
    assert "no sbatch on this machine" in capsys.readouterr().err
    assert (tmp_path / "job.slurm").exists()
