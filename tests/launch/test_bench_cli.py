"""`lmtrain bench` as its users type it: what it takes, prints and keeps, and its exit codes."""

import json
from pathlib import Path

import pytest
import torch

from launch.cli import main
from tests.lmtrain import tiny

QUICK = ["--lengths", "32,16", "--repeats", "1", "--device", "cpu"]


def test_one_json_object_on_stdout_and_the_same_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(tiny.write(tmp_path)), *tiny.settings(tmp_path), *QUICK, "--out", f"{tmp_path}/out", "--json"]
    assert main(words) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told == json.loads((tmp_path / "out/bench.json").read_text())
    assert told["protocol"]["lengths"] == [16, 32]
    assert "16 tokens" in said.err
    kept = (tmp_path / "out/bench.json").read_bytes()
    assert main(words) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert (tmp_path / "out/bench.json").read_bytes() == kept


def test_without_a_configuration_settings_may_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["model.dim=64", "model.mixers.local.window=4"]
    assert main(["bench", *settings, "--mixers", "local", *QUICK]) == 0
    said = capsys.readouterr()
    assert "dense 8x8" in said.out
    assert "local\n  whole mixer beside dense 8x8" in said.out
    (folder,) = (tmp_path / "bench").iterdir()
    told = json.loads((folder / "bench.json").read_text())
    assert told["protocol"]["mixers"]["local"]["window"] == 4
    assert told["protocol"]["dim"] == 64
    assert f"kept in bench/{folder.name}: bench.json, bench.csv, bench.svg" in said.err


def test_all_mistakes_at_once_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "model.dim=100", "--mixers", "local,loacl", *QUICK]) == 2
    said = capsys.readouterr().err
    assert "heads 8 does not divide dim 100" in said
    assert "--mixers=loacl: no such mixer here; did you mean local? (local)" in said
    assert "2 problems; nothing was started." in said
    assert main(["bench", "demmo", *QUICK]) == 2
    assert "did you mean demo?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--lengths=0", "--lengths=1k", "--repeats=0", "--seconds=-1", "--device=abacus"])
def test_options_that_make_no_sense(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", option])
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_tuning_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tune", "--out", str(tmp_path), "--lengths", "64"]) == 2
    said = capsys.readouterr().err
    assert "needs a CUDA device" in said
    assert "2 problems; nothing was started." in said
