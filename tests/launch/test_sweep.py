"""The driver of a sweep: what becomes of runs that fail, and of a driver that is stopped, or killed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from attention.mixer import parameter_count
from launch import sweep as driving
from launch.cli import main
from launch.sweep import Driver, Options, launched
from lmtrain.model import DecoderLM
from lmtrain.run import read_metrics, read_status
from lmtrain.run.lock import Holder
from lmtrain.sweep.folder import SweepFolder
from lmtrain.sweep.planner import make_plan
from lmtrain.sweep.result import RunFailure, RunResult
from lmtrain.sweep.standing import standing_of
from tests.lmtrain import tiny
from tests.processes import SECONDS, begin, wait_until

STUB = Path(__file__).parent / "sweep_stub.py"
AXES = {
    "mixer": {
        "a": {"model.mixers.far": {"kind": "dense", "heads": 2}, "model.pattern": "far"},
        "b": {"model.mixers.far": {"kind": "dense", "heads": 4}, "model.pattern": "far"},
        "c": {"model.mixers.far": {"kind": "dense", "heads": 1}, "model.pattern": "far"},
    }
}


def written(folder: Path, settings: dict | None = None, **changes) -> Path:
    """A sweep of three runs in `folder`, which keeps everything below it."""
    tiny.write(folder)
    below = dict(word.split("=", 1) for word in tiny.settings(folder) if not word.startswith("run.dir"))
    content = {"base": "tiny.yaml", "settings": below | {"train.steps": 12} | (settings or {}), "axes": AXES, **changes}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Drives a sweep of stubs; `ends`: name -> how its attempts end. Returns exit code, plan, folder, what was said."""
    plans = tmp_path / "plans"
    plans.mkdir()
    monkeypatch.setattr(driving, "LMTRAIN", [str(STUB), str(plans)])
    monkeypatch.setattr(driving, "PAUSE", 0.01)

    def go(options: Options | None = None, ends: dict[str, str] | None = None, **changes) -> tuple:
        for name, words in (ends or {}).items():
            (plans / name).write_text(words)
        plan = make_plan(str(written(tmp_path, **changes)))
        folder = SweepFolder(tmp_path / "out", plan.spec.name)
        said: list[str] = []
        return Driver(plan, folder, options or Options(), said.append).go(), plan, folder, said

    return go


def attempts(folder: SweepFolder, run) -> list[str]:
    return (folder.path / f"attempts-{run.folder}.txt").read_text().splitlines()


@pytest.mark.fault(20)
def test_every_run_has_a_result_and_is_not_run_again(drive: Callable) -> None:
    code, plan, folder, _ = drive(Options(workers=3, threads=5), seeds=[1, 2])
    assert code == 0
    for run in plan.runs:
        result = RunResult.read(folder.of(run))
        assert (result.name, result.hash, result.axes, result.seed) == (run.name, run.hash, run.axes, run.axes["seed"])
        assert result.mixer == run.axes["mixer"]
        assert (result.loss, result.tokens, result.tokens_per_second, result.peak_memory) == (2.0, 12 * 128, 64.0, 1000)
        assert result.seconds == 12 * 128 / 64
        assert "65536" in result.state_bytes
        assert result.group == result.name
        assert result.command.startswith("lmtrain train ")
        assert [line.split()[-1] for line in attempts(folder, run)] == ["5"]
    assert drive(seeds=[1, 2])[0] == 0
    assert all(len(attempts(folder, run)) == 1 for run in plan.runs)
    code, larger, _, _ = drive(seeds=[1, 2, 3])
    assert code == 0
    assert all(len(attempts(folder, run)) == 1 for run in larger.runs)


def test_failures_are_listed_and_the_others_go_on(drive: Callable) -> None:
    ends = {"a": "crash crash crash", "b": "crash done", "c": "wrong done"}
    code, plan, folder, said = drive(ends=ends)
    a, b, c = plan.runs
    assert code == 3
    assert RunResult.read(folder.of(b)) is not None
    assert [len(attempts(folder, run)) for run in plan.runs] == [2, 2, 1]  # a mistake is not tried twice
    for run, reason, count, exit_code in ((a, "RuntimeError: it broke", 2, 1), (c, "a mistake", 1, 2)):
        failure = RunFailure.read(folder.of(run))
        assert (failure.name, failure.attempts, failure.exit_code) == (run.name, count, exit_code)
        assert reason in failure.reason
        assert "$ " in Path(failure.log).read_text()
        assert any(line.startswith(f"failed: {run.name}") and reason in line for line in said)
    standing = standing_of(plan, folder)
    assert [each.state for each in standing.runs] == ["failed", "done", "failed"]
    assert "1 done, 0 running, 2 failed, 0 queued" in standing.format()
    assert drive()[0] == 0  # the next call tries those that failed again
    assert not (folder.of(a) / "failure.json").exists()


def test_out_of_memory_halves_the_micro_batch_of_the_same_batch(drive: Callable) -> None:
    ends = {"a": "memory killed done", "b": "memory memory memory memory"}
    code, plan, folder, said = drive(ends=ends, settings={"train.batch_tokens": 32 * 12, "train.micro_batch": 6})
    a, b, _ = plan.runs
    assert code == 3

    def micro_batches(run) -> list[int]:
        assert all("train.batch_tokens=384" in line for line in attempts(folder, run))
        return [int(line.split("train.micro_batch=")[-1].split()[0]) for line in attempts(folder, run)]

    assert micro_batches(a) == [6, 3, 1]
    assert micro_batches(b) == [6, 3, 1, 1]  # at 1 it is a crash like others: once more
    assert "can't allocate memory" in RunFailure.read(folder.of(b)).reason
    assert any("again with train.micro_batch=3, the same batch" in line for line in said)


def test_a_run_beyond_its_time_is_given_up(drive: Callable) -> None:
    code, plan, folder, _ = drive(Options(timeout=5), ends={"b": "slow"})
    assert code == 3
    failure = RunFailure.read(folder.of(plan.runs[1]))
    assert failure.reason == "not trained within 5 seconds"
    assert failure.exit_code is None
    assert RunResult.read(folder.of(plan.runs[2])) is not None


def test_forks_wait_for_their_trunk_and_fail_with_it(drive: Callable) -> None:
    code, plan, folder, _ = drive(Options(workers=4), ends={"b-trunk8": "wrong"}, tokens=[1280, 2560], cooldown=0.2)
    assert code == 3
    for run in plan.runs:
        if run.axes["mixer"] == "b":
            assert RunResult.read(folder.of(run)) is None
            assert run.name == "b-trunk8" or "its parent b-trunk" in RunFailure.read(folder.of(run)).reason
        elif run.is_trunk:
            assert RunResult.read(folder.of(run)) is None
        else:
            result = RunResult.read(folder.of(run))
            assert (result.parent, result.group) == (run.parent.name, f"{run.axes['mixer']}-trunk8")
            checkpoint = folder.of(run.parent) / "checkpoints" / f"step-{run.begins}"
            assert f"--resume {checkpoint}" in attempts(folder, run)[0]
            assert result.command.endswith(f"--resume {checkpoint}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"sweep.json": '{"version": 99, "name": "sweep"}'}, "of version 99, this lmtrain reads 1"),
        ({"sweep.json": '{"version": 1, "name": "other"}'}, "holds the sweep other, not sweep"),
        ({"sweep.json": "{"}, "not readable"),
        ({"notes.txt": "mine"}, "is not empty and holds no sweep"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, str], words: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    for action in ("plan", "run", "status"):
        assert main(["sweep", action, str(written(tmp_path)), "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
    assert {path.name: path.read_text() for path in out.iterdir()} == content


def test_a_text_that_is_missing_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    assert main(["sweep", "run", str(path), "data.path=nowhere.txt", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("nowhere.txt") == 1
    assert not (tmp_path / "out").exists()


def test_a_plan_is_only_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(written(tmp_path)), "--out", str(tmp_path / "out"), "--json"]
    assert main(["sweep", "plan", *command]) == 0
    told = json.loads(capsys.readouterr().out)
    plan = make_plan(command[0])
    assert [(row["name"], row["hash"]) for row in told["runs"]] == [(run.name, run.hash) for run in plan.runs]
    for row, run in zip(told["runs"], plan.runs, strict=True):
        made = DecoderLM(replace(run.config.model, vocab_size=256))
        cost = made.cost(32)
        assert row["parameters_total"] == parameter_count(made)
        assert row["tokens"] == 12 * 128
        assert row["flops"] == 3 * cost.flops / 32 * row["tokens"]
        assert (row["pairs"], row["state_bytes"]) == (cost.pairs / 32, cost.state_bytes)
    assert told["flops"] == sum(row["flops"] for row in told["runs"])
    assert main(["sweep", "status", *command]) == 0
    assert json.loads(capsys.readouterr().out)["queued"] == 3
    assert not (tmp_path / "out").exists()


def test_launchers_start_the_ranks_of_a_run() -> None:
    words = ["train", "demo", "run.seed=1"]
    assert launched(Options(), words)[1:] == ["-m", "lmtrain", *words]
    torchrun = launched(Options(launcher="torchrun", processes=4), words)
    assert torchrun[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=4" in torchrun
    assert torchrun[-5:] == ["-m", "lmtrain", *words]
    assert launched(Options(launcher="deepspeed", processes=4), words)[-6:] == [
        "--num_gpus=4", "--module", "lmtrain", *words,
    ]  # fmt: skip


def test_slurm_gets_a_script_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "run", str(written(tmp_path)), "--out", str(tmp_path / "out"), "--launcher", "slurm"]
    assert main([*command, "--processes", "2"]) == 0
    said = capsys.readouterr().out
    scripts = sorted((tmp_path / "out/scripts").iterdir())
    assert len(scripts) == 3
    for script in scripts:
        assert f"sbatch {script}" in said
        text = script.read_text()
        assert f"run.dir={tmp_path}/out/{script.stem}" in text
        assert "--nproc-per-node=2" in text
        subprocess.run(["bash", "-n", str(script)], check=True)
    written(tmp_path, tokens=[1280, 2560], cooldown=0.2)
    assert main(command) == 2
    assert "leave out cooldown" in capsys.readouterr().err


def started(path: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """`lmtrain sweep run` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "lmtrain",
        "sweep",
        "run",
        str(path),
        "--out",
        str(out),
        "--threads",
        "1",
        *options,
    ]
    return begin(command, stderr=subprocess.PIPE)


@pytest.mark.fault(20)
@pytest.mark.slow
def test_a_driver_that_is_killed_or_stopped_costs_no_step_twice(tmp_path: Path) -> None:
    """Its worker saves and ends, and the next driver goes on from there; the third one finishes."""
    steps = 120
    settings = {"train.steps": steps, "checkpoint.every": steps, "log.every": 1, "eval.every": 0}
    path = written(tmp_path, settings, axes={"mixer": {"a": AXES["mixer"]["a"]}})
    out = tmp_path / "out"
    (run,) = make_plan(str(path)).runs
    folder = out / run.folder
    stops = [0]
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        driver = started(path, out)
        wait_until(lambda: len(read_metrics(folder)) > stops[-1] + 10)
        worker = Holder.read(folder / "lock")
        assert worker is not None
        driver.send_signal(number)
        assert driver.wait(SECONDS) == code
        wait_until(lambda worker=worker: not worker.alive())
        assert read_status(folder).state == "stopped"
        stops.append(read_status(folder).step)
    assert 10 < stops[1] < stops[2] - 10 < steps
    assert started(path, out).wait(SECONDS) == 0
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "split" not in row] == list(range(1, steps + 1))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "start" for event in events) == 3
    result = RunResult.read(folder)
    assert result.tokens == steps * 128
    assert math.isclose(result.loss, next(row["loss"] for row in rows if "split" in row), rel_tol=0.5)
    assert main(["sweep", "status", str(path), "--out", str(out)]) == 0
