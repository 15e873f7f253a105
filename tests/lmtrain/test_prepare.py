"""`lmtrain prepare`: what it says, how it stops, and that training uses what it made."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import data.parts
import lmtrain.prepare
from data.tokenizer import tokenizer_hash
from launch.cli import main
from lmtrain.config import ConfigError
from lmtrain.setup import build_data
from lmtrain.train import DONE, train
from tests.lmtrain import tiny

TEXT = b"".join(b"line %d of a text that is long enough\n" % index for index in range(3000))


@pytest.fixture
def order(tmp_path: Path) -> list[str]:
    """A command that prepares a text of several documents."""
    (tmp_path / "texts").mkdir()
    for index in range(25):
        (tmp_path / "texts" / f"{index:02}.txt").write_bytes(TEXT[: 4000 * (index + 1)])
    return [
        "prepare",
        "text",
        f"data.path={tmp_path / 'texts'}",
        "data.validation=0.15",
        f"data.cache={tmp_path / 'cache'}",
    ]


def test_it_says_what_there_is(order: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*order, "data.tokenizer=bpe", "data.vocab_size=300", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["corpus"] == "text"
    assert said["tokenizer"]["name"] == "bpe"
    assert said["tokenizer"]["vocab_size"] == 300
    assert list(said["splits"]) == ["train", "validation"]
    validation = said["splits"]["validation"]
    last = [TEXT[: 4000 * (index + 1)] for index in (23, 24)]
    assert validation["documents"] == 2
    assert validation["bytes"] == sum(map(len, last))
    assert validation["words"] == sum(len(text.split()) for text in last)
    lengths = np.diff(np.load(Path(validation["path"]) / "documents.npy"))
    assert validation["tokens"] == lengths.sum()
    assert validation["bytes_per_token"] == validation["bytes"] / lengths.sum()
    assert validation["tokens_per_document"] == {
        "min": lengths.min(), "median": np.median(lengths), "mean": lengths.mean(), "max": lengths.max()
    }  # fmt: skip
    assert main([*order, "data.tokenizer=bpe", "data.vocab_size=300"]) == 0
    text = capsys.readouterr().out
    for words in (f"{validation['tokens']:,} tokens", f"{validation['words']:,} words", validation["fingerprint"]):
        assert words in text


def test_training_finds_what_was_prepared(order: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*order, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    inodes = [os.stat(split["path"]).st_ino for split in said["splits"].values()]
    found = build_data(lmtrain.prepare.read_order("text", order[2:]))
    assert found.train.fingerprint == said["splits"]["train"]["fingerprint"]
    assert found.validation[0].fingerprint == said["splits"]["validation"]["fingerprint"]
    assert [os.stat(split["path"]).st_ino for split in said["splits"].values()] == inodes


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell starts in the background is told to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_exits_with_75_and_goes_on_later(
    order: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:  # fmt: skip
    monkeypatch.setattr(data.parts, "PART_BYTES", 50_000)
    with monkeypatch.context() as patch:
        patch.setattr(lmtrain.prepare._Speed, "__call__", lambda *_: os.kill(os.getpid(), number))
        assert main([*order, "--workers", "2"]) == 75
    assert "stopped; what is finished is kept, and the same command goes on" in capsys.readouterr().err
    (parts,) = (tmp_path / "cache").glob("*.parts")
    kept = {path.name: path.stat().st_ino for path in parts.glob("part-*.bin")}
    assert kept
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [parts]
    assert main([*order, "--workers", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not parts.exists()
    assert main([*order, f"data.cache={tmp_path / 'other'}", "--json"]) == 0
    assert (
        said["splits"]["train"]["fingerprint"] == json.loads(capsys.readouterr().out)["splits"]["train"]["fingerprint"]
    )


def test_mistakes_exit_with_2(order: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*order, "data.tokenizer=bpee"]) == 2
    assert "data.tokenizer=bpee: must be bytes, characters, bpe or the path" in capsys.readouterr().err
    assert main([*order, "data.vocab_size=300"]) == 2
    assert "only the tokenizer bpe is made of a size that can be chosen" in capsys.readouterr().err
    assert main([*order, "data.tokenizer=gone/tokenizer.json"]) == 2
    assert "data.tokenizer: 'gone/tokenizer.json' is no file" in capsys.readouterr().err
    assert main(["prepare", "recall/mqar"]) == 2
    assert "mqar is made as it is read, there is nothing to prepare" in capsys.readouterr().err
    (tmp_path / "texts" / "03.txt").write_bytes(b"abc \xff")
    assert main([*order, "data.tokenizer=bpe"]) == 2
    assert "03.txt, byte 4: not UTF-8" in capsys.readouterr().err


def test_a_run_on_byte_pairs_from_training_to_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ["data.tokenizer=bpe", "data.vocab_size=280", "train.steps=2", "eval.every=2", "checkpoint.every=2"]
    assert train(tiny.config(tmp_path, *tokenizer)) == DONE
    run = tmp_path / "run"
    assert main(["eval", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (held_out,) = build_data(tiny.config(tmp_path, *tokenizer)).validation
    assert said["fingerprint"] == held_out.fingerprint
    assert said["scored_tokens"] == len(held_out.tokens) - 1
    assert said["bytes"] == held_out.bytes - len(held_out.tokenizer.decode(held_out.tokens[:1]))
    assert main(["generate", str(run), "--prompt", "naïve", "--length", "20", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("naïve")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=bytes: was 'bpe' when this run began"):
        tiny.config(tmp_path, "train.steps=2", "data.tokenizer=bytes", *tokenizer[2:])


def test_the_texts_of_a_mixture_have_one_tokenizer(
    order: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_bytes(b"Quite another text. " * 500)
    texts = f"{{one: {{corpus: text, path: '{tmp_path}/texts', weight: 1}}, "
    texts += f"two: {{corpus: text, path: '{tmp_path}/other.txt', weight: 2}}}}"
    mixture = [f"data.mixture={texts}", "data.tokenizer=bpe", "data.vocab_size=300", order[-1]]
    assert main(["prepare", "demo", "data.corpus=mixture", *mixture, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["splits"]) == ["one:train", "one:validation", "two:train", "two:validation"]
    found = build_data(lmtrain.prepare.read_order("demo", ["data.corpus=mixture", *mixture]))
    assert tokenizer_hash(found.tokenizer) == said["tokenizer"]["sha256"]
    assert [part.fingerprint for part in found.train.parts] == [
        said["splits"][name]["fingerprint"] for name in ("one:train", "two:train")
    ]


def test_every_known_name_is_a_configuration_or_a_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert lmtrain.prepare.read_order("demo", []).data.corpus == "stdlib"
    assert lmtrain.prepare.read_order("iid", ["data.alphabet=3"]).data.corpus == "iid"
    assert main(["prepare", "nothing"]) == 2
    assert "no such file, nor a shipped configuration" in capsys.readouterr().err
