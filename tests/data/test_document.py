"""Documents are read lazily, in pieces that cut no character, compressed or not."""

import gzip
import lzma
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.compressed
import data.document
from data.document import Document, Split, WordCounter, character_start, whole_documents

zstd = pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda text: zstd.compress(text, options={zstd.CompressionParameter.checksum_flag: 1}),
}
TEXT = "naïve 文字 🎈 words\r\nand\tmore ".encode()


def pieces(content: bytes, sizes: list[int]) -> list[str]:
    """The text in pieces of the given numbers of characters."""
    text, out = content.decode(), []
    for size in sizes:
        out.append(text[:size])
        text = text[size:]
    return [piece for piece in [*out, text] if piece]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 1000])
@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_chunks_are_the_text_and_cut_no_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, suffix: str
) -> None:
    monkeypatch.setattr(data.document, "CHUNK", chunk)
    path = tmp_path / f"text{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT * 3))
    document = Document.whole(path)
    assert document.num_bytes == 3 * len(TEXT)
    chunks = list(document.chunks())
    assert b"".join(chunks) == TEXT * 3
    assert all(chunks)
    assert "".join(piece.decode() for piece in chunks) == (TEXT * 3).decode()


def test_a_document_is_a_range_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"0123456789"))
    assert b"".join(Document(tmp_path / "a.gz", 3, 7).chunks()) == b"3456"


@given(st.binary(min_size=1, max_size=40))
def test_bytes_that_are_no_text_pass_unchanged(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("binary") / "file"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.document, "CHUNK", 3)
        assert b"".join(Document.whole(path).chunks()) == content


def test_a_file_that_has_become_shorter_is_named_with_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "shrinking"
    path.write_bytes(b"0123456789")
    document = Document.whole(path)
    path.write_bytes(b"0123")
    with pytest.raises(ValueError, match=r"shrinking, byte 4: .* 6 bytes too early"):
        list(document.chunks())


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not compressed"])
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    content = bytearray(COMPRESS[suffix](TEXT * 50))
    if damage == "truncated":
        content = content[:-9]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(TEXT)
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken{suffix}: cannot be read"):
        Document.whole(path)


def test_without_its_package_a_zst_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zst").write_bytes(zstd.compress(TEXT))
    monkeypatch.setattr(data.compressed, "ZSTD", None)
    with pytest.raises(ValueError, match=r"a\.zst: to read \.zst files, pip install backports\.zstd"):
        Document.whole(tmp_path / "a.zst")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: cannot be read"):
        Document.whole(tmp_path / "nowhere")


def test_empty_files_are_no_documents(tmp_path: Path) -> None:
    for name, content in (("a", b"x"), ("b", b""), ("c.gz", gzip.compress(b"")), ("d", b"y")):
        (tmp_path / name).write_bytes(content)
    documents = whole_documents(sorted(tmp_path.iterdir()))
    assert [document.path.name for document in documents] == ["a", "d"]


def test_a_split_locates_an_offset_in_its_file() -> None:
    split = Split((Document(Path("one"), 0, 10), Document(Path("two"), 5, 8), Document(Path("three"), 0, 4)))
    assert split.num_bytes == 17
    assert split.locate(0) == "one, byte 0"
    assert split.locate(9) == "one, byte 9"
    assert split.locate(10) == "two, byte 5"
    assert split.locate(13) == "three, byte 0"


@given(st.text(max_size=30), st.lists(st.integers(1, 5), max_size=8))
def test_words_are_counted_as_by_split(text: str, sizes: list[int]) -> None:
    content = text.encode("utf-8", "replace")
    counter = WordCounter()
    for piece in pieces(content, sizes):
        counter.add(piece.encode())
    assert counter.words == len(content.decode().split())


def test_ends_of_lines_count_where_they_are_words() -> None:
    counter = WordCounter(lines_are_words=True)
    for chunk in (b" \n = Tit", b"le = \n two words \n"):
        counter.add(chunk)
    assert counter.words == 5 + 3


def test_words_of_bytes_that_are_no_text() -> None:
    counter = WordCounter()
    counter.add(b"\xff\xfe a\x80b\n")
    assert counter.words == 2


def test_character_start() -> None:
    text = "a文🎈".encode()
    assert [character_start(text, position) for position in range(len(text))] == [0, 1, 1, 1, 4, 4, 4, 4]
    assert character_start(b"\x80" * 9, 6) == 6  # five continuation bytes in a row belong to no character
    assert character_start(b"\x80\x80", 1) == 1


def test_titles_are_paths_below_the_common_folder(tmp_path: Path) -> None:
    for name in ("books/a.txt", "books/b/1.txt", "books/b/2.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    documents = whole_documents(sorted(tmp_path.rglob("*.txt")))
    assert [document.title for document in documents] == ["a.txt", "b/1.txt", "b/2.txt"]
    assert Document.whole(tmp_path / "books/b/1.txt").part(1, 2).title == "1.txt"
