"""Train and validation share no byte and lose none."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.document import Document, Split, whole_documents
from data.holdout import MANY_DOCUMENTS, hold_out, part


def content(split: Split) -> bytes:
    return b"".join(split.chunks())


def write(folder: Path, texts: list[bytes]) -> list[Document]:
    for index, text in enumerate(texts):
        (folder / f"{index:04}").write_bytes(text)
    return whole_documents(sorted(folder.iterdir()))


@given(
    st.lists(
        st.text(min_size=1, max_size=8).map(lambda text: text.encode("utf-8", "replace")),
        min_size=1,
        max_size=25,
    ),
    st.sampled_from(["0.1", "0.5", "0.25", "1e-3", "0.999"]),
)
def test_every_byte_is_in_exactly_one_of_train_and_validation(
    tmp_path_factory: pytest.TempPathFactory, texts: list[bytes], share: str
) -> None:
    documents = write(tmp_path_factory.mktemp("texts"), texts)
    splits = hold_out(documents, share)
    assert content(splits["train"]) + content(splits["validation"]) == content(splits["all"]) == b"".join(texts)
    content(splits["train"]).decode()  # no character is cut
    content(splits["validation"]).decode()


@given(st.integers(2, 10**12), st.sampled_from(["0.1", "0.05", "0.3", "0.7"]))
def test_the_cut_of_plain_text_is_the_floor_of_the_share(size: int, share: str) -> None:
    tenths = {"0.1": 90, "0.05": 95, "0.3": 70, "0.7": 30}[share]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Document, "chunks", lambda self: iter([b"a" * self.num_bytes]))
        splits = hold_out([Document(Path("big"), 0, size)], share)
    assert splits["train"].num_bytes == size * tenths // 100
    assert splits["validation"].num_bytes == size - size * tenths // 100


def test_the_cut_moves_back_to_the_start_of_a_character(tmp_path: Path) -> None:
    documents = write(tmp_path, ["aaa🎈b".encode()])  # 8 bytes; half of them end inside the balloon
    splits = hold_out(documents, "0.5")
    assert content(splits["train"]) == b"aaa"
    assert content(splits["validation"]) == "🎈b".encode()


def test_the_cut_does_not_move_back_into_another_document(tmp_path: Path) -> None:
    documents = write(tmp_path, [b"aa\xf0", b"\x9f\x8e\x88\x80"])  # one character across two files: not text
    assert content(hold_out(documents, "0.5")["train"]) == b"aa\xf0"


def test_many_documents_are_cut_at_the_nearest_border(tmp_path: Path) -> None:
    sizes = [3] * MANY_DOCUMENTS
    splits = hold_out(write(tmp_path, [b"x" * size for size in sizes]), "0.1")  # 54 of 60
    assert (splits["train"].num_bytes, splits["validation"].num_bytes) == (54, 6)
    splits = hold_out(whole_documents(sorted(tmp_path.iterdir())), "0.11")  # 53
    assert splits["train"].num_bytes == 54
    splits = hold_out(whole_documents(sorted(tmp_path.iterdir())), "0.001")  # 59; but a document must validate
    assert splits["validation"].num_bytes == 3


def test_few_documents_are_cut_inside(tmp_path: Path) -> None:
    splits = hold_out(write(tmp_path, [b"x" * 10, b"y" * 10]), "0.25")
    assert content(splits["train"]) == b"x" * 10 + b"y" * 5
    assert [document.num_bytes for document in splits["train"].documents] == [10, 5]
    assert [(d.start, d.stop) for d in splits["validation"].documents] == [(5, 10)]


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "1.5", "nan", "inf", "10"])
def test_a_share_outside_0_and_1_is_refused(tmp_path: Path, share: str) -> None:
    with pytest.raises(ValueError, match=r"data\.validation: .*" + share):
        hold_out(write(tmp_path, [b"text"]), share)


def test_a_file_of_its_own_validates(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    documents = write(tmp_path / "train", [b"train a", b"train b"])
    (tmp_path / "valid.txt").write_bytes(b"validation")
    splits = hold_out(documents, str(tmp_path / "valid.txt"))
    assert content(splits["train"]) == content(splits["all"]) == b"train atrain b"
    assert content(splits["validation"]) == b"validation"


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_training_data_cannot_validate(tmp_path: Path, link) -> None:
    (tmp_path / "train").mkdir()
    documents = write(tmp_path / "train", [b"a", b"b"])
    path = tmp_path / "train" / "0001"
    if link:
        link(path, tmp_path / "link")
        path = tmp_path / "link"
    with pytest.raises(ValueError, match=f"{path} of the split validation is also training data"):
        hold_out(documents, str(path))


def test_a_validation_text_must_be_there_and_hold_something(tmp_path: Path) -> None:
    documents = write(tmp_path, [b"a"])
    with pytest.raises(ValueError, match=r"data\.validation: no file 'nowhere'"):
        hold_out(documents, "nowhere")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"data\.validation: .*empty holds no text"):
        hold_out(documents, str(tmp_path / "empty"))


def test_parts_leave_no_empty_document() -> None:
    documents = [Document(Path("a"), 2, 5), Document(Path("b"), 0, 4)]
    assert part(documents, 0, 3).documents == (documents[0],)
    assert part(documents, 3, 5).documents == (Document(Path("b"), 0, 2),)
    assert part(documents, 1, 4).documents == (Document(Path("a"), 3, 5), Document(Path("b"), 0, 1))
    assert part(documents, 4, 4).documents == ()
