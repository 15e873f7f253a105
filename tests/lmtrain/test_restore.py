"""Opening a run: the newest checkpoint that verifies, its tokenizer and weights; every mistake in words."""

from pathlib import Path

import pytest
import torch

from data.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer
from lmtrain import checkpoint
from lmtrain.config import load, save
from lmtrain.model import DecoderLM
from lmtrain.restore import model_to_audit, open_run
from lmtrain.setup import with_vocabulary

CONFIG = """
data: {corpus: text, path: missing.txt, seq_len: 8, tokenizer: TOKENIZER}
train: {batch_tokens: 16}
model:
  dim: 8
  layers: 1
  dropout: 0.5
  mixers: {near: {kind: local, heads: 2, window: 4}}
  pattern: near
"""
OPTIMIZER = {"step": torch.zeros(1)}


def make_run(folder: Path, tokenizer: Tokenizer, steps: list[int]) -> dict[int, DecoderLM]:
    """A run's folder as training leaves it, with a checkpoint of a model of its own at each step."""
    folder.mkdir()
    written = folder / "config.yaml"
    written.write_text(CONFIG.replace("TOKENIZER", tokenizer.name))
    config = load(written)
    save(config, written)
    models = {}
    for step in steps:
        torch.manual_seed(step)
        models[step] = DecoderLM(with_vocabulary(config, tokenizer).model)
        tensors = {"model": models[step].state_dict(), "optimizer": OPTIMIZER}
        state = {"step": step, "tokenizer": tokenizer.to_json()}
        checkpoint.save(folder / "checkpoints", step, tensors, state, dataset="fingerprint")
    return models


def damage(folder: Path, name: str = "model.safetensors") -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def same_weights(left: DecoderLM, right: DecoderLM) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "a run"


def test_the_newest_checkpoint(run, capsys):
    models = make_run(run, ByteTokenizer(), [9, 10])
    restored = open_run(run)
    assert restored.checkpoint == run / "checkpoints/step-10"
    assert (restored.step, restored.fingerprint, restored.run) == (10, "fingerprint", run)
    assert same_weights(restored.model, models[10])
    assert not restored.model.training
    assert restored.tokenizer.encode(b"a").tolist() == [97]
    assert restored.config.data.seq_len == 8
    assert capsys.readouterr() == ("", "")


def test_the_tokenizer_says_how_large_the_vocabulary_is(run):
    make_run(run, CharacterTokenizer("abcé"), [1])
    restored = open_run(run)
    assert restored.config.model.vocab_size == len(restored.model.head_weight) == 4
    assert restored.tokenizer.decode(restored.tokenizer.encode("éba".encode())) == "éba".encode()


@pytest.mark.fault(3)
def test_a_damaged_one_is_named_and_passed_over(run, capsys):
    models = make_run(run, ByteTokenizer(), [1, 2, 3])
    damage(run / "checkpoints/step-3", "optimizer.safetensors")
    damage(run / "checkpoints/step-2", "state.json")
    restored = open_run(run)
    assert restored.step == 1
    assert same_weights(restored.model, models[1])
    told = capsys.readouterr()
    assert told.out == ""
    third, second = told.err.splitlines()
    assert "step-3 is damaged and not used: optimizer.safetensors: " in third
    assert "step-2 is damaged and not used: state.json: " in second


@pytest.mark.parametrize("how", ["checkpoint folder", "name", "path", "relative"])
def test_a_checkpoint_that_was_asked_for(run, how, monkeypatch):
    models = make_run(run, ByteTokenizer(), [1, 2])
    folder = run / "checkpoints/step-1"
    if how == "relative":
        monkeypatch.chdir(folder)
    restored = {
        "checkpoint folder": lambda: open_run(folder),
        "name": lambda: open_run(run, "step-1"),
        "path": lambda: open_run(run, folder),
        "relative": lambda: open_run("."),
    }[how]()
    assert (restored.step, restored.checkpoint, restored.run) == (1, folder, run)
    assert same_weights(restored.model, models[1])


@pytest.mark.fault(3)
def test_an_asked_one_that_is_damaged_is_no_reason_to_take_another(run):
    make_run(run, ByteTokenizer(), [1, 2])
    damage(run / "checkpoints/step-2")
    with pytest.raises(ValueError, match=r"step-2: model\.safetensors: its sha256"):
        open_run(run, "step-2")
    with pytest.raises(ValueError, match=r"step-2: model\.safetensors: its sha256"):
        open_run(run / "checkpoints/step-2")


def test_overrides(run):
    make_run(run, ByteTokenizer(), [1])
    assert open_run(run, overrides=["eval.context=4"]).config.eval_context == 4
    with pytest.raises(ValueError, match=r"step-1 does not fit .*config\.yaml"):
        open_run(run, overrides=["model.dim=16"])


def test_what_is_no_run(run, tmp_path):
    with pytest.raises(ValueError, match="a run: no such folder"):
        open_run(run)
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        open_run(tmp_path)
    make_run(run, ByteTokenizer(), [])
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        open_run(run)


def test_a_checkpoint_that_does_not_exist(run):
    make_run(run, ByteTokenizer(), [1, 20])
    with pytest.raises(ValueError, match="has no checkpoint step-3; it has step-20, step-1"):
        open_run(run, "step-3")
    with pytest.raises(ValueError, match="would be another"):
        open_run(run / "checkpoints/step-1", "step-20")


def test_all_are_damaged(run, capsys):
    make_run(run, ByteTokenizer(), [1, 2])
    damage(run / "checkpoints/step-1")
    (run / "checkpoints/step-2/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* verifies; the damaged ones are named above"):
        open_run(run)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_checkpoint_without_a_tokenizer(run):
    models = make_run(run, ByteTokenizer(), [1])
    checkpoint.save(run / "checkpoints", 2, {"model": models[1].state_dict()}, {"step": 2})
    with pytest.raises(ValueError, match="step-2: its state has no tokenizer"):
        open_run(run)


class TestModelToAudit:
    def test_of_a_run_has_its_weights(self, run):
        models = make_run(run, ByteTokenizer(), [1])
        model, config = model_to_audit(run)
        assert same_weights(model, models[1])
        assert config.data.seq_len == 8

    def test_of_a_configuration_is_fresh_and_repeatable(self, tmp_path, monkeypatch):
        """Characters: the vocabulary is only known from the text."""
        monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
        (tmp_path / "text").write_text("abcde fghij\n" * 20)
        written = tmp_path / "c.yaml"
        written.write_text(CONFIG.replace("TOKENIZER", "characters"))
        overrides = [f"data.path={tmp_path / 'text'}", "data.seq_len=4"]
        (model, config), (again, _) = (model_to_audit(written, overrides) for _ in range(2))
        assert config.model.vocab_size == len(model.head_weight) == 12
        assert config.data.seq_len == 4
        assert same_weights(model, again)
        assert not model.training
