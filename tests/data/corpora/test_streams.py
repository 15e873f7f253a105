"""enwik8 and text8 bear the name that their numbers must bear, and have the official splits."""

import hashlib
import lzma
from dataclasses import replace
from pathlib import Path

import pytest

from data.corpora import streams
from data.corpus import load_corpus
from tests.data.corpora.contents import content

HEAD = b"<mediawiki xmlns="


@pytest.fixture
def small_enwik8(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A stand-in for the official file, of 2,000 bytes."""
    official = HEAD + bytes(i % 251 for i in range(2000 - len(HEAD)))
    monkeypatch.setattr(streams, "SIZE", len(official))
    known = replace(streams.ENWIK8, md5=hashlib.md5(official).hexdigest())
    monkeypatch.setattr(streams, "ENWIK8", known)
    return official


@pytest.mark.parametrize("name", ["enwik8", "enwik8.xz"])
def test_enwik8_is_found_checked_and_split(small_enwik8: bytes, name: str) -> None:
    Path(name).write_bytes(lzma.compress(small_enwik8) if name.endswith("xz") else small_enwik8)
    corpus = load_corpus("enwik8")
    assert corpus.name == "enwik8"
    assert content(corpus.split("train")) == small_enwik8[:1800]
    assert content(corpus.split("validation")) == small_enwik8[1800:1900]
    assert content(corpus.split("test")) == small_enwik8[1900:]
    assert content(corpus.split("all")) == small_enwik8


def test_what_is_not_enwik8_is_not_called_so(small_enwik8: bytes) -> None:
    Path("enwik8").write_bytes(small_enwik8[:-1] + b"!")
    with pytest.raises(ValueError, match="enwik8: has the size of enwik8, but not its md5"):
        load_corpus("enwik8")
    Path("enwik8").write_bytes(small_enwik8 + b"!")
    with pytest.raises(ValueError, match="2,001 bytes are more than the 2,000 of enwik8"):
        load_corpus("enwik8")
    Path("enwik8").write_bytes(b"x" + small_enwik8[1:])
    with pytest.raises(ValueError, match="enwik8: not enwik8, which begins with <mediawiki"):
        load_corpus("enwik8")
    Path("enwik8").touch()


@pytest.mark.parametrize(
    ("size", "name"),
    [(1_499_999, "1m"), (1_500_001, "2m"), (3_954_400, "4m"), (99_999_999, "100m"), (250_000, "250k")],
)
def test_a_prefix_of_enwik8_is_called_a_prefix(
    size: int, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "prefix"
    with path.open("wb") as file:  # sparse: no 100 MB are written
        file.write(HEAD)
        file.truncate(size)
    corpus = load_corpus("enwik8", str(path))
    assert corpus.name == f"enwik8-prefix{name}"
    sizes = [corpus.split(split).num_bytes for split in ("train", "validation", "test")]
    assert sizes == [size * 9 // 10, size * 95 // 100 - size * 9 // 10, size - size * 95 // 100]


def test_a_missing_enwik8_is_explained(small_enwik8: bytes) -> None:
    with pytest.raises(ValueError, match=r"data\.corpus: no file enwik8 or .* in .*; get enwik8\.zip"):
        load_corpus("enwik8")
    Path("enwik8_part.xz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"set data\.path for enwik8_part\.xz"):
        load_corpus("enwik8")
    with pytest.raises(ValueError, match=r"data\.path: no file 'other' in"):
        load_corpus("enwik8", "other")


@pytest.fixture
def small_text8(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A stand-in for the official file, of 2,000 bytes."""
    official = b"some words " * 181 + b"anarchism"
    monkeypatch.setattr(streams, "SIZE", len(official))
    monkeypatch.setattr(streams, "TEXT8", replace(streams.TEXT8, md5=hashlib.md5(official).hexdigest()))
    return official


def test_text8_is_checked_and_split(small_text8: bytes) -> None:
    Path("text8").write_bytes(small_text8)
    corpus = load_corpus("text8")
    assert corpus.name == "text8"
    assert [content(corpus.split(split)) for split in ("train", "validation", "test")] == [
        small_text8[:1800],
        small_text8[1800:1900],
        small_text8[1900:],
    ]
    Path("text8").write_bytes(small_text8[:-1] + b"n")
    with pytest.raises(ValueError, match="text8: has the size of text8, but not its md5"):
        load_corpus("text8")
    Path("text8").write_bytes(small_text8[:1500])
    assert load_corpus("text8").name == "text8-prefix2k"


@pytest.mark.parametrize("wrong", [b"A", b"\n", b"1", b"\xff"])
def test_other_characters_are_not_text8(monkeypatch: pytest.MonkeyPatch, wrong: bytes) -> None:
    monkeypatch.setattr("data.document.CHUNK", 100)
    Path("text8").write_bytes(b"words " * 100 + wrong + b" word")
    with pytest.raises(ValueError, match=r"text8, byte 600: not text8, which has no b'"):
        load_corpus("text8")


def test_an_empty_file_is_no_stream() -> None:
    Path("text8").touch()
    with pytest.raises(ValueError, match="text8: empty"):
        load_corpus("text8")


def test_the_shipped_prefix_of_enwik8(shipped_data: Path) -> None:
    corpus = load_corpus("enwik8", str(shipped_data / "enwik8_prefix_3954400.xz"))
    assert corpus.name == "enwik8-prefix4m"
    assert corpus.split("train").num_bytes == 3_558_960
    assert corpus.split("validation").num_bytes == corpus.split("test").num_bytes == 197_720
    assert (
        hashlib.sha256(content(corpus.split("all"))).hexdigest()
        == "9010ba68c6c496bbd8d01a9a33acd22d468566936d430046d6d4a045352decb9"
    )
