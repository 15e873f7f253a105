"""A model as files for other programs: the safetensors library reads them, and they are the model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer import from_json
from launch.cli import main
from lmtrain.config import load
from lmtrain.files import TEMPORARY
from lmtrain.model import DecoderLM
from lmtrain.restore import open_run
from tests.lmtrain import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    path = tiny.write(folder)
    mixer = "model.mixers.far={kind: vq, heads: 2, block: 8, codes: 4}"
    assert main(["train", str(path), *tiny.settings(folder), mixer, "model.tied=true"]) == 0
    return folder / "run"


def test_the_files_are_the_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine"
    assert main(["checkpoint", "export", str(run / "checkpoints/step-8"), "--safetensors", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    tensors = load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    model = DecoderLM(load(out / "config.yaml", []).model).eval()
    model.load_state_dict(tensors)
    restored = open_run(run, "step-8")
    tokens = torch.randint(0, 256, (1, 30))
    assert torch.equal(model(tokens), restored.model(tokens))
    assert from_json(json.loads((out / "tokenizer.json").read_text())).to_json() == restored.tokenizer.to_json()


def test_the_newest_of_a_run_and_nothing_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "export", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "export/step-12")
    assert main(["checkpoint", "export", str(run)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not [path for path in (run / "export").iterdir() if TEMPORARY.fullmatch(path.name)]


@pytest.mark.parametrize("words", [["verify", "--out", "x"], ["verify", "--safetensors"]])
def test_verify_takes_no_words_of_export(words: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", *words, str(run)]) == 2
    assert "say how to export, not to verify" in capsys.readouterr().err
