"""Files of one's own: bytes as they are, documents by file, what validates never trains."""

from pathlib import Path

import pytest

from data.corpus import load_corpus
from tests.data.corpora.contents import content, texts


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return str(folder)


def test_text_keeps_bytes_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\x00\xff")
    corpus = load_corpus("text", str(tmp_path / "a.txt"))
    assert corpus.name == "text"
    assert content(corpus.split("all")) == b"one\r\ntwo\x00\xff"


def test_text_too_short_to_split_can_still_be_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x")
    corpus = load_corpus("text", str(tmp_path / "a.txt"))
    assert content(corpus.split("all")) == b"x"
    with pytest.raises(ValueError, match="too short, nothing is left for the split 'train'"):
        corpus.split("train")


def test_text_needs_a_path_that_holds_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path"):
        load_corpus("text")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"data\.path: .*empty\.txt holds no text"):
        load_corpus("text", str(tmp_path / "empty.txt"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"data\.path: no file '.*folder'"):
        load_corpus("text", str(tmp_path / "folder"))


def test_files_are_documents_and_empty_ones_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "books", {"b/2.txt": b"two", "a.txt": b"one", "none.txt": b""})
    corpus = load_corpus("text", folder)
    assert texts(corpus.split("all")) == {"a.txt": b"one", "b/2.txt": b"two"}
    assert corpus.notes == (f"{folder}: 1 of 3 files are empty and were left out",)


@pytest.mark.parametrize("name", ["copy.txt", "v/a.txt"])
def test_a_copy_of_training_data_cannot_validate(tmp_path: Path, name: str) -> None:
    train = write(tmp_path / "train", {"a.txt": b"twice", "b.txt": b"other"})
    held_out = write(tmp_path / "valid", {name: b"twice", "c.txt": b"third"})
    with pytest.raises(
        ValueError, match=rf"data\.validation: .*{name} of the split validation is also training data: .*train/a\.txt"
    ):
        load_corpus("text", train, held_out)


def test_texts_that_repeat_themselves_across_the_cut_are_told(tmp_path: Path) -> None:
    files = {f"{i:02}.txt": b"text %02d" % i for i in range(18)} | {"90.txt": b"text 07", "91.txt": b"other"}
    corpus = load_corpus("text", write(tmp_path / "many", files))
    assert list(texts(corpus.split("validation"))) == ["90.txt", "91.txt"]
    assert corpus.notes == ("1 of 2 documents that validate are, word for word, training data too",)


def test_tiny_shakespeare_has_the_split_of_nanogpt(shipped_data: Path) -> None:
    corpus = load_corpus("text", str(shipped_data / "tinyshakespeare/input.txt"))
    assert corpus.split("train").num_bytes == 1_003_854
    assert corpus.split("validation").num_bytes == 111_540
