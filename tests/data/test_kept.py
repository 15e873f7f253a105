"""A kept text is read once, is whole or absent, and does not depend on where the cache is."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.document import Document
from data.kept import KeptDocument, KeptPart, Texts, content_digest, keep

TEXTS = [
    ("train", "one", "Straße 文字\n".encode()),
    ("train", "nothing", b""),
    ("train", "two", b"two words\n\n"),
    ("test", "three", b"x" * 3_000_000),
]


def kept(cache: Path, texts: Texts = TEXTS, source: object = "source") -> dict[str, KeptPart]:
    return keep("tale", [source], lambda: iter(texts), cache)


def contents(part: KeptPart) -> dict[str, bytes]:
    return {document.title: b"".join(document.chunks()) for document in part.documents}


def test_documents_are_what_was_read_and_empty_ones_are_counted(tmp_path: Path) -> None:
    parts = kept(tmp_path)
    assert list(parts) == ["train", "test"]
    assert contents(parts["train"]) == {"one": TEXTS[0][2], "two": TEXTS[2][2]}
    assert contents(parts["test"]) == {"three": TEXTS[3][2]}
    assert [(part.words, part.lines, part.empty) for part in parts.values()] == [(4, 3, 1), (1, 0, 0)]
    assert [d.digest for d in parts["train"].documents] == [
        content_digest([TEXTS[0][2]]),
        content_digest([TEXTS[2][2]]),
    ]


def test_a_text_is_read_once(tmp_path: Path) -> None:
    first = kept(tmp_path)

    def never() -> Iterator:
        raise AssertionError("read again")
        yield

    assert keep("tale", ["source"], never, tmp_path) == first
    with pytest.raises(AssertionError, match="read again"):
        keep("tale", ["another source"], never, tmp_path)


def test_identity_is_that_of_the_text_not_of_the_cache(tmp_path: Path) -> None:
    here, there = kept(tmp_path / "a")["train"].documents, kept(tmp_path / "b")["train"].documents
    other = kept(tmp_path / "a", source="other")["train"].documents
    assert [d.identity() for d in here] == [d.identity() for d in there]
    assert json.dumps(here[0].identity()) != json.dumps(other[0].identity())
    assert here[0].path != there[0].path


def test_a_part_of_a_document_is_one_too(tmp_path: Path) -> None:
    document = kept(tmp_path)["train"].documents[1]
    part = document.part(4, 9)
    assert isinstance(part, KeptDocument)
    assert b"".join(part.chunks()) == b"words"
    assert (part.title, part.digest) == ("two", b"")
    assert part.locate(2).startswith(f"two, byte {2} (byte {document.start + 6} of ")


@pytest.mark.parametrize("damage", ["text.bin", "documents.json", "one byte", "missing"])
def test_a_damaged_text_is_made_anew(tmp_path: Path, damage: str) -> None:
    documents = kept(tmp_path)["train"].documents
    folder = documents[0].path.parent
    if damage == "one byte":
        path = folder / "documents.json"
        path.write_text(path.read_text().replace('"two"', '"owt"'))
    elif damage == "missing":
        (folder / "text.bin").unlink()
    else:
        path = folder / damage
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged cache, made anew"):
        assert kept(tmp_path)["train"].documents == documents


def test_what_fails_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, str, bytes]]:
        yield TEXTS[0]
        raise ValueError("line 2: broken")

    with pytest.raises(ValueError, match="line 2: broken"):
        keep("tale", ["source"], broken, tmp_path)
    assert not [path for path in (tmp_path / "texts").iterdir() if path.is_dir()]
    assert list(kept(tmp_path)) == ["train", "test"]


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache: cannot write the text of tale into .*file"):
        kept(tmp_path / "file")


def test_equal_texts_have_equal_digests_however_they_are_cut() -> None:
    assert content_digest([b"ab", b"c"]) == content_digest([b"abc"]) != content_digest([b"abd"])


def test_a_document_of_a_file_is_none_of_a_kept_text(tmp_path: Path) -> None:
    document = kept(tmp_path)["train"].documents[0]
    assert document != Document(document.path, document.start, document.stop, document.title)
