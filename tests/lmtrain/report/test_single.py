"""`lmtrain report RUN...`: runs that nobody planned together, compared as those of a sweep are."""

import csv
import json
import shlex
import sys
from pathlib import Path

import pytest

from launch.cli import main
from lmtrain.config import load
from lmtrain.inspect import inspect
from lmtrain.report.single import read_runs
from lmtrain.run import read_metrics
from tests.lmtrain import tiny

RUNS = {"a-1": [], "a-2": ["run.seed=2"], "b": ["model.pattern=far far"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one configuration, and another one."""
    folder = tmp_path_factory.mktemp("single")
    path = tiny.write(folder)
    for name, changes in RUNS.items():
        assert main(["train", str(path), *tiny.settings(folder, f"run.dir={folder}/{name}", *changes)]) == 0
    return folder


def test_results_are_what_runs_and_inspect_say(folder: Path) -> None:
    collected = read_runs([folder / name for name in RUNS])
    first, second, other = collected.runs
    assert (first.mixer, second.mixer, other.mixer) == ("a-1", "a-1", "b")
    last = [row for row in read_metrics(folder / "a-1") if "scored_tokens" in row][-1]
    assert (first.loss, first.bits_per_byte, first.tokens) == (last["loss"], last["bits_per_byte"], 12 * 128)
    seen = inspect(load(folder / "a-1/config.yaml", [f"model.vocab_size={256}"])).to_json()
    assert first.parameters_total == seen["parameters"]
    assert first.flops == pytest.approx(seen["flops_per_token"]["training"] * first.tokens)
    assert first.seconds > 0
    assert first.command == shlex.join(sys.argv)


def test_a_page_of_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *(str(folder / name) for name in RUNS), "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out/report.html") in capsys.readouterr().out
    page = (tmp_path / "out/report.html").read_text()
    assert "a-1 and a-2 and b" in page
    assert "token counts D: 1 distinct, at least 4 are needed" in page
    with open(tmp_path / "out/runs.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(RUNS)


def test_the_evaluation_that_all_were_given_counts(folder: Path) -> None:
    for name in RUNS:
        assert main(["eval", str(folder / name), "--context", "16"]) == 0
    collected = read_runs([folder / name for name in RUNS])
    (kept,) = [json.loads(path.read_text()) for path in (folder / "b/eval").glob("*context16*.json")]
    assert kept["scored_tokens"] > 256  # more than those of training
    assert collected.runs[2].loss == kept["loss"]


def test_a_run_that_was_stopped_is_refused(folder: Path, tmp_path: Path) -> None:
    status = json.loads((folder / "b/status.json").read_text())
    (tmp_path / "half").mkdir()
    (tmp_path / "half/status.json").write_text(json.dumps(status | {"state": "stopped", "step": 4}))
    with pytest.raises(ValueError, match="half: stopped at step 4; finish it first"):
        read_runs([folder / "b", tmp_path / "half"])


def test_what_cannot_be_compared_is_told_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = [str(tmp_path / name) for name in ("x", "y")]
    assert main(["report", str(folder / "b"), *nowhere, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("no run there") == 2
    assert not (tmp_path / "out").exists()


def test_runs_scored_in_different_ways_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tiny.write(tmp_path)
    assert main(["train", str(path), *tiny.settings(tmp_path, "eval.tokens=128")]) == 0
    with pytest.raises(ValueError, match="no evaluation that all runs have in common") as error:
        read_runs([folder / "b", tmp_path / "run"])
    assert "scored_tokens 128" in str(error.value)
