"""Lines of JSON: a column is the text; what is wrong is told with file and line."""

import gzip
import json
from pathlib import Path

import pytest

from data.corpus import load_corpus
from tests.data.corpora.contents import content, texts


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_each_line_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(
        lines({"text": "Straße\r\n", "id": 1}, {"text": ""}) + b"\n" + lines({"text": "z"})
    )
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines({"text": "first"})))
    corpus = load_corpus("jsonl", str(tmp_path))
    expected = {"a.jsonl.gz:1": b"first", "b.jsonl:1": "Straße\r\n".encode(), "b.jsonl:4": b"z"}
    assert texts(corpus.split("all")) == expected
    assert corpus.name == "jsonl"
    assert corpus.notes == ("1 lines without text were left out",)


def test_a_column_can_be_chosen_and_text_of_its_own_validates(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"body": "one", "text": "no"}, {"body": "two", "text": "no"}))
    (tmp_path / "valid.jsonl").write_bytes(lines({"body": "three"}))
    corpus = load_corpus("jsonl", str(tmp_path / "train.jsonl"), str(tmp_path / "valid.jsonl"), column="body")
    assert content(corpus.split("train")) == b"onetwo"
    assert texts(corpus.split("validation")) == {"valid.jsonl:1": b"three"}


def test_a_share_validates_by_default(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": f"text {i:03}"} for i in range(100))))
    corpus = load_corpus("jsonl", str(tmp_path / "a.jsonl"))
    assert len(corpus.split("train").documents) == 90
    assert list(texts(corpus.split("validation")).values()) == [b"text %03d" % i for i in range(90, 100)]


def test_a_line_that_trains_cannot_validate(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"text": "one"}, {"text": "two"}))
    (tmp_path / "valid.jsonl").write_bytes(lines({"text": "six"}, {"text": "two"}))
    message = r"data\.validation: valid\.jsonl:2 of the split validation is also training data: train\.jsonl:2"
    with pytest.raises(ValueError, match=message):
        load_corpus("jsonl", str(tmp_path / "train.jsonl"), str(tmp_path / "valid.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"not JSON \("),
        (b"[" * 100_000, r"not JSON \("),
        (b'["text"]', "must be an object .*, not list"),
        (b'{"body": "x", "id": 1}', r"no column 'text'; it has body, id: set data\.column"),
        (b'{"text": 1}', "the column 'text' holds no text but int"),
        (b'{"text": null}', "the column 'text' holds no text but NoneType"),
        (b'{"text": "\xff"}', "not UTF-8 at its byte 10"),
        (rb'{"text": "ab\ud800"}', "character 2 of 'text' is half of a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "right"}) + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {message}"):
        load_corpus("jsonl", str(tmp_path / "a.jsonl"))


def test_a_line_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.corpora.jsonl.MOST_LINE_BYTES", 50)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "right"}, {"text": "x" * 50}))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: longer than 50 bytes"):
        load_corpus("jsonl", str(tmp_path / "a.jsonl"))


def test_there_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path: the corpus `jsonl` needs"):
        load_corpus("jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"data\.path: .*a\.jsonl holds no text"):
        load_corpus("jsonl", str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(lines({"text": ""}))
    with pytest.raises(ValueError, match=r"data\.path: .*a\.jsonl holds no text"):
        load_corpus("jsonl", str(tmp_path / "a.jsonl"))


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines({"text": "first"}))[:-4])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: cannot be read"):
        load_corpus("jsonl", str(tmp_path / "a.jsonl.gz"))
