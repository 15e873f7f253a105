"""A dataset says what it holds, and every damage to it is named."""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data.dataset
from data.corpus import Corpus
from data.dataset import (
    DOCUMENT_BYTES,
    DOCUMENT_WORDS,
    DOCUMENTS,
    FILES,
    LONGEST_TITLE,
    META,
    SHARD,
    TITLES,
    open_dataset,
    sha256_json,
    write_dataset,
)
from data.document import Document, Split
from data.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer

TEXTS = (b"the first text\n", b"a second one")


@pytest.fixture
def written(text_corpus: Callable[..., Corpus], tmp_path: Path) -> Callable[..., Path]:
    def write(tokenizer: Tokenizer, *texts: bytes, folder: str = "dataset") -> Path:
        write_dataset(tmp_path / folder, "text", "all", text_corpus(*texts).split("all"), tokenizer)
        return tmp_path / folder

    return write


def forge(folder: Path, *left_out: str, **changes) -> None:
    """Rewrites meta.json as a forger would: with a right checksum, and right sizes and hashes of the other files."""
    meta = json.loads((folder / META).read_bytes())
    del meta["checksum"]
    for name, entry in meta["files"].items():
        content = (folder / name).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    meta.update(changes)
    for name in left_out:
        del meta[name]
    (folder / META).write_text(json.dumps({**meta, "checksum": sha256_json(meta)}))


def test_a_dataset_holds_what_was_written(written: Callable[..., Path]) -> None:
    dataset = open_dataset(written(ByteTokenizer(), *TEXTS))
    assert bytes(dataset.tokens) == b"".join(TEXTS)
    assert dataset.tokens.dtype == np.uint8
    assert dataset.document_starts.tolist() == [0, 15, 27]
    assert (dataset.bytes, dataset.words) == (27, 6)
    assert dataset.document_bytes.tolist() == [15, 12]
    assert dataset.document_words.tolist() == [3, 3]
    assert dataset.document_bytes.dtype == dataset.document_words.dtype == np.int64
    assert dataset.titles == ["0000.txt", "0001.txt"]
    assert (dataset.corpus, dataset.split) == ("text", "all")
    assert isinstance(dataset.tokenizer, ByteTokenizer)


def test_bytes_and_words_are_those_of_the_text_in_any_tokens(written: Callable[..., Path]) -> None:
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    texts = (f"文字 🎈 {characters}".encode(), "naïve 文".encode())
    tokenizer = CharacterTokenizer("".join(text.decode() for text in texts))
    dataset = open_dataset(written(tokenizer, *texts))
    assert dataset.tokens.dtype == np.dtype("<u2")
    assert dataset.tokenizer.decode(dataset.tokens) == b"".join(texts)
    assert dataset.tokenizer.token_bytes[dataset.tokens].sum() == dataset.bytes == len(b"".join(texts))
    assert dataset.words == 5
    assert dataset.document_bytes.tolist() == [len(text) for text in texts]
    assert dataset.document_words.tolist() == [3, 2]
    assert dataset.document_starts.tolist() == [0, 305, 312]


def test_the_fingerprint_is_of_the_content_alone(written: Callable[..., Path]) -> None:
    def fingerprint(folder: str, tokenizer: Tokenizer, *texts: bytes) -> str:
        return open_dataset(written(tokenizer, *texts, folder=folder)).fingerprint

    first = fingerprint("a", ByteTokenizer(), *TEXTS)
    assert len(first) == 64
    assert fingerprint("elsewhere", ByteTokenizer(), *TEXTS) == first
    assert fingerprint("b", ByteTokenizer(), TEXTS[0], b"a second onf") != first
    assert fingerprint("c", ByteTokenizer(), TEXTS[0] + b"a", b" second one") != first  # other documents
    assert fingerprint("d", CharacterTokenizer("".join(map(chr, range(128)))), *TEXTS) != first


def test_the_fingerprint_does_not_change_between_versions(written: Callable[..., Path]) -> None:
    """Runs and results refer to it: a new number here means that old runs can no longer be resumed."""
    expected = "258212383ee860cf36bd0f335990ca39923fc7f7e7183046053b42a19cda04be"
    assert open_dataset(written(ByteTokenizer(), *TEXTS)).fingerprint == expected


def test_titles_are_bounded_and_printable_and_do_not_enter_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a text")
    fingerprints = []
    for index, title in enumerate(("t" * 999, "\udcff 🎈")):
        split = Split((Document(tmp_path / "text", 0, 6, title),))
        write_dataset(tmp_path / f"{index}", "text", "all", split, ByteTokenizer())
        dataset = open_dataset(tmp_path / f"{index}")
        assert dataset.titles == [["t" * LONGEST_TITLE, "? 🎈"][index]]
        fingerprints.append(dataset.fingerprint)
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.fault(14)
@pytest.mark.parametrize("name", [*FILES, META])
def test_every_flipped_bit_is_found(written: Callable[..., Path], name: str) -> None:
    path = written(ByteTokenizer(), *TEXTS) / name
    intact = path.read_bytes()
    for index in range(0, len(intact), 3 if name == META else 1):
        damaged = bytearray(intact)
        damaged[index] ^= 1 << index % 5  # five flips turn no white space of JSON into other white space
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            open_dataset(path.parent)
    path.write_bytes(intact)
    open_dataset(path.parent)


@pytest.mark.fault(14)
@pytest.mark.parametrize("name", [*FILES, META])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "long", "folder"])
def test_every_wrong_size_is_named(written: Callable[..., Path], name: str, damage: str) -> None:
    path = written(ByteTokenizer(), *TEXTS) / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "short": content[:-1], "long": content + b"x"}[damage])
    with pytest.raises(ValueError, match=name):
        open_dataset(path.parent)


@pytest.mark.fault(14)
def test_a_cut_shard_is_named_with_the_offset(written: Callable[..., Path]) -> None:
    folder = written(CharacterTokenizer("".join(map(chr, range(97, 97 + 400)))), b"abcabc")
    os.truncate(folder / SHARD, 7)  # half a token is left
    with pytest.raises(ValueError, match=f"{SHARD}: damaged, it ends at byte 7 instead of 12"):
        open_dataset(folder)


@pytest.mark.fault(14)
@pytest.mark.parametrize("full_check", [True, False])
def test_an_id_outside_the_vocabulary_is_named_with_the_offset(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, full_check: bool
) -> None:
    folder = written(CharacterTokenizer("abc"), b"abcabcabcabc")
    content = bytearray((folder / SHARD).read_bytes())
    content[9] = 3
    (folder / SHARD).write_bytes(content)
    forge(folder)
    if not full_check:
        monkeypatch.setattr(data.dataset, "FULL_CHECK_BYTES", 0)
        monkeypatch.setattr(data.dataset, "SAMPLE_TOKENS", 2)
    with pytest.raises(ValueError, match=f"{SHARD}: damaged, the token at byte 9 is 3, but the vocabulary has 3"):
        open_dataset(folder)


def test_a_large_dataset_is_sampled(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(CharacterTokenizer("abc"), b"abc" * 1000)
    content = bytearray((folder / SHARD).read_bytes())
    content[1500] = 2 - content[1500]
    (folder / SHARD).write_bytes(content)
    with pytest.raises(ValueError, match="its sha256 is not"):
        open_dataset(folder)
    monkeypatch.setattr(data.dataset, "FULL_CHECK_BYTES", 2999)
    monkeypatch.setattr(data.dataset, "SAMPLE_TOKENS", 5)
    open_dataset(folder)  # a valid id in place of another is beyond what sampling can see
    content[-1] = 200
    (folder / SHARD).write_bytes(content)
    with pytest.raises(ValueError, match="the token at byte 2999 is 200"):
        open_dataset(folder)


def test_another_version_is_refused(written: Callable[..., Path]) -> None:
    folder = written(ByteTokenizer(), *TEXTS)
    forge(folder, version=99)
    with pytest.raises(ValueError, match=r"meta\.json: has version 99; this program reads version 2"):
        open_dataset(folder)


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.fault(16)
@pytest.mark.parametrize("name", [*FILES, META])
@pytest.mark.parametrize("wrapped", ["plain", "npy"])
def test_nothing_in_a_file_is_executed(written: Callable[..., Path], tmp_path: Path, name: str, wrapped: str) -> None:
    folder = written(ByteTokenizer(), *TEXTS)
    trace = tmp_path / "executed"
    if wrapped == "plain":
        (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    else:
        with (folder / name).open("wb") as file:
            np.save(file, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=name):
        open_dataset(folder)
    assert not trace.exists()


def npy(values: list, dtype: str = "<i8") -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, dtype=dtype))
    return file.getvalue()


def huge_header() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)})
    return file.getvalue()


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (DOCUMENTS, huge_header(), "not an array of numbers"),
        (DOCUMENTS, npy([0, 27]), r"int64 \[2\] is not int64 \[3\]"),
        (DOCUMENTS, npy([0, 15, 27], "<f8"), "float64"),
        (DOCUMENTS, npy([[0, 15, 27]]), r"\[1, 3\]"),
        (DOCUMENTS, npy([0, 0, 27]), "document starts must increase from 0 to 27"),
        (DOCUMENTS, npy([0, 15, 28]), "document starts must increase from 0 to 27"),
        (DOCUMENTS, npy([0, -(2**63), 27]), "document starts must increase from 0 to 27"),
        (DOCUMENT_BYTES, npy([15]), r"int64 \[1\] is not int64 \[2\]"),
        (DOCUMENT_BYTES, npy([15, 0]), "document 1 cannot have the size 0"),
        (DOCUMENT_BYTES, npy([2**63 - 1, 2]), "document 0 cannot have the size"),
        (DOCUMENT_WORDS, npy([3, -1]), "document 1 cannot have the size -1"),
        (DOCUMENT_WORDS, npy([16, 3]), "document 0 cannot have the size 16"),
        (DOCUMENT_WORDS, huge_header(), "not an array of numbers"),
        (TITLES, b'["a"]', "not a list of 2 titles"),
        (TITLES, b'{"a": 1, "b": 2}', "not a list of 2 titles"),
        (TITLES, b'["a", 2]', "title 1 is no text of at most 200 characters"),
        (TITLES, json.dumps(["a", "t" * 201]).encode(), "title 1 is no text of at most 200 characters"),
        (TITLES, b"[" * 4000, "not JSON"),
        (TITLES, b" " * 10_000, "10000 bytes are more than the 4824 it can have"),
    ],
)
def test_a_forged_file_is_named(written: Callable[..., Path], name: str, content: bytes, message: str) -> None:
    folder = written(ByteTokenizer(), *TEXTS)
    (folder / name).write_bytes(content)
    forge(folder)
    with pytest.raises(ValueError, match=f"{name}: damaged, .*{message}"):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 28}, f"{SHARD}: damaged, 27 bytes are not 28 tokens"),
        ({"tokens": "27"}, "tokens must be of type int"),
        ({"documents": 10**15}, "1000000000000000 documents of 27 tokens"),
        ({"documents": 0}, "0 documents of 27 tokens"),
        ({"documents": -1}, "-1 documents"),
        ({"files": {}}, f"bytes and sha256 of {SHARD}"),
        ({"files": {name: {"bytes": 1} for name in FILES}}, f"bytes and sha256 of {SHARD}"),
        ({"files": [1]}, "files must be of type dict"),
        ({"corpus": 3}, "corpus must be of type str"),
        ({"tokenizer": {}}, "its tokenizer cannot be used"),
        ({"tokenizer": {"name": "characters"}}, "its tokenizer cannot be used"),
        ({"tokenizer": {"name": "characters", "characters": 3}}, "its tokenizer cannot be used"),
        ({"tokenizer": {"name": ["bytes"]}}, "its tokenizer cannot be used"),
        ({"tokenizer": {"name": "characters", "characters": "abc"}}, "not the one of tokenizer_sha256"),
    ],
)
def test_forged_metadata_are_named(written: Callable[..., Path], changes: dict, message: str) -> None:
    folder = written(ByteTokenizer(), *TEXTS)
    forge(folder, **changes)
    with pytest.raises(ValueError, match=message):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["tokenizer_sha256", "split", "tokens", "version"])
def test_missing_metadata_are_named(written: Callable[..., Path], name: str) -> None:
    folder = written(ByteTokenizer(), *TEXTS)
    forge(folder, name)
    with pytest.raises(ValueError, match=f"{META}: .*{name}"):
        open_dataset(folder)


def test_a_tokenizer_of_another_vocabulary_is_named(written: Callable[..., Path]) -> None:
    folder = written(CharacterTokenizer("".join(map(chr, range(97, 97 + 300)))), b"abcabc")
    other = CharacterTokenizer("abc").to_json()  # its ids have one byte
    forge(folder, tokenizer=other, tokenizer_sha256=sha256_json(other))
    with pytest.raises(ValueError, match=f"{SHARD}: damaged, 12 bytes are not 6 tokens of 1 bytes"):
        open_dataset(folder)


def test_metadata_that_would_fill_the_memory_are_not_read(written: Callable[..., Path]) -> None:
    folder = written(ByteTokenizer(), *TEXTS)
    os.truncate(folder / META, 1 << 33)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match=f"{META}: damaged, 8589934592 bytes are more than"):
        open_dataset(folder)
