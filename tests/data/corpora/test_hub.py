"""A folder laid out like the hub stands in for it: nothing is downloaded."""

from pathlib import Path

import pytest

from data.corpus import Corpus, load_corpus
from tests.data.corpora.contents import content, texts
from tests.data.corpora.hub_folder import write_hub_folder

pytestmark = pytest.mark.usefixtures("datasets_at_home")

ROWS = {
    "train": ["Straße\n", "", "second text", "third text"],
    "validation": ["to validate"],
    "test": ["to test", "another"],
}


def write_rows(folder: Path, rows: dict[str, list[str]], form: str, column: str = "text") -> str:
    tables = {split: [{"id": 1, column: text} for text in contents] for split, contents in rows.items()}
    return write_hub_folder(folder, tables, form)


def load(path: str, **settings: object) -> Corpus:
    return load_corpus("hub", path, **settings)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_splits_are_those_of_the_dataset(tmp_path: Path, form: str, streaming: bool) -> None:
    corpus = load(write_rows(tmp_path / "some set", ROWS, form), streaming=streaming)
    assert texts(corpus.split("train")) == {
        "train:0": "Straße\n".encode(),
        "train:2": b"second text",
        "train:3": b"third text",
    }
    assert texts(corpus.split("validation")) == {"validation:0": b"to validate"}
    assert texts(corpus.split("test")) == {"test:0": b"to test", "test:1": b"another"}
    assert content(corpus.split("all")) == "".join(text for rows in ROWS.values() for text in rows).encode()
    assert corpus.name == "hub-some-set"
    assert corpus.notes == ("1 rows without text were left out",)


def test_read_once_whether_it_streams_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "set", ROWS, "jsonl")
    corpus = load(path, streaming=True)
    monkeypatch.setattr("datasets.load_dataset", None)
    assert load(path) == corpus


def test_a_folder_is_found_as_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "owner", ROWS, "parquet")
    monkeypatch.setenv("LMTRAIN_DATA", str(tmp_path))
    assert load("owner").name == "hub-owner"


def test_column_and_the_split_that_trains_and_the_one_that_validates_can_be_chosen(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set", ROWS, "parquet", "body")
    corpus = load(path, column="body", split="test", validation="train")
    assert content(corpus.split("train")) == b"to testanother"
    assert content(corpus.split("validation")) == "".join(ROWS["train"]).encode()
    assert set(corpus.splits) == {"train", "validation", "all"}


def test_a_share_validates_where_the_dataset_has_no_such_split(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set", {"train": [f"text {i:02}" for i in range(50)], "test": ["test"]}, "parquet")
    corpus = load(path)
    assert len(corpus.split("train").documents) == 45
    assert list(texts(corpus.split("validation"))) == [f"train:{i}" for i in range(45, 50)]
    assert content(corpus.split("test")) == b"test"
    with pytest.raises(ValueError, match=r"data\.validation: .*set has no split 'dev' to validate; it has test, or"):
        load(path, validation="dev")
    with pytest.raises(ValueError, match=r"data\.validation: a share must lie between 0 and 1"):
        load(path, validation="1.5")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set", ROWS, "parquet", "body")
    with pytest.raises(ValueError, match=r"set, row 0 of train: no column 'text'; it has id, body: set data\.column"):
        load(path)
    with pytest.raises(ValueError, match=r"set, row 0 of train: the column 'id' holds no text but int"):
        load(path, column="id")
    with pytest.raises(
        ValueError, match=r"data\.split: .*has no text in a split 'dev', but in train, validation, test"
    ):
        load(path, column="body", split="dev")
    with pytest.raises(ValueError, match=r"data\.path: the dataset .*set cannot be read: .*other"):
        load(path, column="body", subset="other")
    with pytest.raises(ValueError, match=r"data\.path: the corpus `hub` needs the name of a dataset"):
        load_corpus("hub")


def test_a_document_that_trains_cannot_test(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set", ROWS | {"test": ["to test", "third text"]}, "parquet")
    with pytest.raises(ValueError, match=r"data\.path: test:1 of the split test is also training data: train:3"):
        load(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set", ROWS, "parquet")
    file = Path(path) / "data/test.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"data\.path: the dataset .*set cannot be read: "):
            load(path, streaming=streaming)


def test_a_dataset_that_is_a_program_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted/scripted.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ValueError, match=r"scripts are no longer supported.*refs/convert/parquet.*text or jsonl"):
        load(str(tmp_path / "scripted"))


def test_offline_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **settings: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    with pytest.raises(
        ValueError, match=r"data\.path: the dataset nobody/nothing cannot be read: .*; or set data\.path to"
    ):
        load("nobody/nothing")
