"""A dataset says what it holds, and every damage to it is named."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data.dataset
from data.corpus import Corpus
from data.dataset import DOCUMENTS, META, SHARD, open_dataset, sha256_json, write_dataset
from data.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer

TEXTS = (b"the first text\n", b"a second one")


@pytest.fixture
def written(text_corpus: Callable[..., Corpus], tmp_path: Path) -> Callable[..., Path]:
    def write(tokenizer: Tokenizer, *texts: bytes, folder: str = "dataset") -> Path:
        write_dataset(tmp_path / folder, "text", "all", text_corpus(*texts).split("all"), tokenizer)
        return tmp_path / folder

    return write


def forge(folder: Path, **changes) -> None:
    """Rewrites meta.json as a forger would: with a right checksum."""
    meta = json.loads((folder / META).read_bytes())
    del meta["checksum"]
    meta.update(changes)
    (folder / META).write_text(json.dumps({**meta, "checksum": sha256_json(meta)}))


def test_a_dataset_holds_what_was_written(written: Callable[..., Path]) -> None:
    dataset = open_dataset(written(ByteTokenizer(), *TEXTS))
    assert bytes(dataset.tokens) == b"".join(TEXTS)
    assert dataset.tokens.dtype == np.uint8
    assert dataset.document_starts.tolist() == [0, 15, 27]
    assert (dataset.bytes, dataset.words) == (27, 6)
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


@pytest.mark.parametrize("name", [SHARD, DOCUMENTS, META])
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


@pytest.mark.parametrize("name", [SHARD, DOCUMENTS, META])
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


def test_a_cut_shard_is_named_with_the_offset(written: Callable[..., Path]) -> None:
    folder = written(CharacterTokenizer("".join(map(chr, range(97, 97 + 400)))), b"abcabc")
    os.truncate(folder / SHARD, 7)  # half a token is left
    with pytest.raises(ValueError, match=f"{SHARD}: damaged, it ends at byte 7 instead of 12"):
        open_dataset(folder)


@pytest.mark.parametrize("full_check", [True, False])
def test_an_id_outside_the_vocabulary_is_named_with_the_offset(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, full_check: bool
) -> None:
    folder = written(CharacterTokenizer("abc"), b"abcabcabcabc")
    content = bytearray((folder / SHARD).read_bytes())
    content[9] = 3
    (folder / SHARD).write_bytes(content)
    meta = json.loads((folder / META).read_bytes())
    meta["shards"][0]["sha256"] = __import__("hashlib").sha256(content).hexdigest()
    forge(folder, shards=meta["shards"])
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
    with pytest.raises(ValueError, match=r"meta\.json: has version 99; this program reads version 1"):
        open_dataset(folder)


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", [SHARD, DOCUMENTS, META])
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


def test_a_forged_header_claims_no_memory(written: Callable[..., Path]) -> None:
    folder = written(ByteTokenizer(), *TEXTS)
    with (folder / DOCUMENTS).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)})
    with pytest.raises(ValueError, match=DOCUMENTS):
        open_dataset(folder)
