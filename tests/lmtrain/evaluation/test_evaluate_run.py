"""`lmtrain eval` and `lmtrain compare` of whole runs: what they print, keep, draw and refuse."""

import json
import sys
from pathlib import Path

import pytest

from launch.cli import main
from lmtrain import checkpoint
from tests.lmtrain import tiny

SENTENCES = [b"the quick brown fox jumps over dog %c, again and again. " % (97 + i) * (3 + i % 4) for i in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds runs of 4 and of 12 updates on bytes, and one on characters; a text of 24 files, and one of a file."""
    folder = tmp_path_factory.mktemp("runs")
    path = tiny.write(folder)
    (folder / "books").mkdir()
    for index, sentence in enumerate(SENTENCES):
        (folder / f"books/{index:02}.txt").write_bytes(sentence)
    runs = {"short": ["train.steps=4"], "long": [], "letters": ["data.tokenizer=characters"]}
    for name, words in runs.items():
        assert main(["train", str(path), *tiny.settings(folder), f"run.dir={folder}/{name}", *words]) == 0
    return folder


@pytest.fixture
def said(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a command that succeeds; what it prints, as JSON if asked for."""

    def run(*words: str):
        assert main([str(folder / word[1:]) if word.startswith("@") else word for word in words]) == 0
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in words else out

    return run


BOOKS = ("--on", "text:all", "--path", "@books")


def test_a_row_says_which_weights_on_which_machine(folder, said) -> None:
    row = said("eval", "@long", "--json")
    manifest = checkpoint.load(folder / "long/checkpoints/step-12").manifest
    written = json.loads((folder / "long/checkpoints/step-12/manifest.json").read_text())
    assert row["checkpoint_sha256"] == written["checksum"] == manifest.checksum
    assert (row["step"], row["trained_length"]) == (12, 32)
    assert row["environment"]["versions"]["torch"]
    assert said("eval", "@short", "--json")["checkpoint_sha256"] != row["checkpoint_sha256"]


@pytest.mark.parametrize("rule", ["concatenate", "reset"])
def test_by_document(folder, said, rule) -> None:
    run = f"books-{rule}"
    if not (folder / run).exists():
        settings = [*tiny.settings(folder), f"data.documents={rule}", f"run.dir={folder}/{run}", "train.steps=2"]
        assert main(["train", str(folder / "tiny.yaml"), *settings]) == 0
    said("list")
    row = said("eval", f"@{run}", *BOOKS, "--by-document", "--json")
    documents = row["by_document"]
    assert row["documents"] == rule
    assert [d["title"] for d in documents] == [f"{i:02}.txt" for i in range(24)]
    assert [d["words"] for d in documents] == [len(text.split()) for text in SENTENCES]
    unscored = 1 if rule == "reset" else 0
    assert [d["bytes"] for d in documents[1:]] == [len(text) - unscored for text in SENTENCES[1:]]
    assert sum(d["bytes"] for d in documents) == row["bytes"]
    kept = next((folder / run / "eval").glob("*by-document.json"))
    assert json.loads(kept.read_text()) == row
    text = said("eval", f"@{run}", *BOOKS, "--by-document")
    assert "24 documents, the best 3 and the worst 3 by bits per byte" in text


def test_by_context_and_a_picture(folder, said, tmp_path) -> None:
    picture = tmp_path / "loss.svg"
    row = said(
        "eval", "@long", *BOOKS, "--context", "512", "--stride", "256", "--by-context", "--plot", str(picture), "--json"
    )
    assert [(c["context"], c["beyond_training"]) for c in row["loss_by_context"]] == [
        (128, True),
        (256, True),
        (512, True),
    ]
    assert len({c["tokens"] for c in row["loss_by_context"]}) == 1
    svg = picture.read_text()
    for words in ("tokens seen", "context, tokens", "nats per token", "text all, one-pass, context 512, stride 256"):
        assert words in svg
    text = said("eval", "@long", *BOOKS, "--context", "512", "--by-context")
    assert "beyond training" in text.split("\n\n")[1]


def test_a_picture_is_refused_before_anything_is_scored(folder, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "there.svg").write_text("")
    for name, message in [
        ("a.png", "should be named .svg"),
        ("there.svg", "is there already"),
        ("no/a.svg", "no folder"),
    ]:
        assert main(["eval", str(folder / "long"), "--plot", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["eval", str(folder / "long"), "--plot", str(tmp_path / "a.svg")]) == 2
    assert "needs matplotlib" in capsys.readouterr().err


def test_compare_two_runs_their_kept_results_and_another_tokenizer(folder, said) -> None:
    found = said("compare", "@short", "@long", *BOOKS, "--context", "32", "--stride", "8", "--json")
    assert (found["unit"], found["units"]) == ("document", 24)
    a, b = found["a"], found["b"]
    assert (a["context"], a["stride"], b["context"], b["stride"]) == (32, 8, 32, 8)
    bits = found["bits_per_byte"]
    assert bits["value"] == pytest.approx(a["bits_per_byte"] - b["bits_per_byte"])
    assert bits["low"] < bits["value"] < bits["high"]
    kept = [str(next((folder / run / "eval").glob("*stride8*by-document.json"))) for run in ("short", "long")]
    assert said("compare", *kept, "--json") == found
    letters = said("compare", kept[0], "@letters", *BOOKS, "--json")
    assert letters["nats_per_token"] is None
    assert letters["b"]["tokenizer"] == "characters"
    assert (letters["b"]["context"], letters["b"]["stride"]) == (32, 8)
    carried = said("compare", kept[0], "@long", *BOOKS, "--carry", "--json")
    assert (carried["a"]["scoring"], carried["b"]["scoring"]) == ("one-pass", "carried")
    text = said("compare", *kept)
    assert f"A - B = {bits['value']:+.4f} bits per byte, 95 % interval" in text
    assert "of 24 documents of text all; 2,000 resamples" in text


def test_the_second_is_scored_as_the_first_whatever_its_own_settings(folder, said) -> None:
    """Of context 16 and stride 4 by its configuration, and its documents apart."""
    settings = ["eval.context=16", "eval.stride=4", "data.documents=reset", "train.steps=2", f"run.dir={folder}/apart"]
    assert main(["train", str(folder / "tiny.yaml"), *tiny.settings(folder), *settings]) == 0
    for first, second, how in [("@apart", "@short", (16, 4, "reset")), ("@short", "@apart", (32, 32, "concatenate"))]:
        found = said("compare", first, second, *BOOKS, "--json")
        assert [(row["context"], row["stride"], row["documents"]) for row in (found["a"], found["b"])] == [how] * 2
    found = said("compare", "@short", "@apart", *BOOKS, "--stride", "8", "--json")
    assert [(row["context"], row["stride"]) for row in (found["a"], found["b"])] == [(32, 8)] * 2


def test_compare_with_the_state_carried(said) -> None:
    found = said("compare", "@short", "@long", *BOOKS, "--carry", "--json")
    assert (found["a"]["scoring"], found["b"]["scoring"]) == ("carried", "carried")


def test_other_texts_are_refused(folder, capsys) -> None:
    assert main(["eval", str(folder / "long"), "--by-document"]) == 0
    kept = next(path for path in (folder / "long/eval").glob("*by-document.json") if "validation" in path.name)
    words = [*BOOKS[:3], str(folder / "books")]
    assert main(["compare", str(kept), str(folder / "short"), *words]) == 2
    assert "their texts differ" in capsys.readouterr().err
    assert main(["compare", str(kept), str(kept), "--context", "8"]) == 2
    assert "nothing is scored, so how has no effect" in capsys.readouterr().err
    assert main(["compare", str(kept), str(folder / "tiny.yaml")]) == 2
    assert "not a result of lmtrain eval" in capsys.readouterr().err


def test_what_does_not_go_together(folder, capsys) -> None:
    for more in (["--context", "8"], ["--stride", "4"], ["--by-context"]):
        assert main(["eval", str(folder / "long"), "--carry", *more]) == 2
        assert "takes no --context, no --stride and no --by-context" in capsys.readouterr().err
