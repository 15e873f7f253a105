"""PG-19: each book a document with its title, compared with the official one; nothing else bears the name."""

import hashlib
import io
import lzma
import tarfile
from pathlib import Path

import pytest

from data.corpora import books, pg19
from data.corpus import load_corpus
from tests.data.corpora.contents import content, texts, words
from tests.data.corpora.hub_folder import write_hub_folder

BOOKS = {
    "train": {7: b"The seventh\r\nbook.\r\n", 10: "Straße\r\n".encode(), 9: b"nine\rlives\r\n"},
    "validation": {21: b"held out\r\n"},
    "test": {30: b"a test\r\n", 4: b"four\r\n"},
}
TITLES = {7: "Seven, or More by Ann", 9: "Nine by B.", 10: "Straße", 21: "Held", 30: "Test", 4: "Four"}
SPLITS = ("train", "validation", "test")


def lf(text: bytes) -> bytes:
    """As Python reads a file in text mode."""
    return io.TextIOWrapper(io.BytesIO(text), encoding="utf-8").read().encode()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is what is official."""
    monkeypatch.setattr(pg19, "BOOKS", {split: len(BOOKS[split]) for split in SPLITS})
    monkeypatch.setattr(pg19, "WORDS", {s: sum(len(t.decode().split()) for t in BOOKS[s].values()) for s in SPLITS})


def write_lists(folder: Path) -> None:
    for split, files in BOOKS.items():
        rows = [f"{number}\t{len(text)}\t{hashlib.sha256(text).hexdigest()}\tyes" for number, text in files.items()]
        header = "book_id\tnum_bytes\tsha256\tin_archive"
        (folder / f"pg19_{split}_files.tsv").write_text("\n".join([header, *rows, ""]))


def write_titles(folder: Path) -> None:
    rows = [f'{number},"{title}",1900,http://www.gutenberg.org/ebooks/{number}' for number, title in TITLES.items()]
    (folder / "metadata.csv").write_text("\n".join([*rows, ""]))


def write_folder(folder: Path, lists: bool = True) -> Path:
    for split, files in BOOKS.items():
        (folder / split).mkdir(parents=True)
        for number, text in files.items():
            (folder / split / f"{number}.txt").write_bytes(text)
    write_titles(folder)
    if lists:
        write_lists(folder)
    return folder


def write_archive(path: Path, members: list[tuple[str, bytes]], link: str | None = None) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in members:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            if link:
                member.type, member.linkname, member.size = tarfile.SYMTYPE, link, 0
            archive.addfile(member, io.BytesIO(text))
    path.write_bytes(lzma.compress(buffer.getvalue()) if path.suffix == ".xz" else buffer.getvalue())


def write_archives(folder: Path) -> Path:
    folder.mkdir()
    for split, files in BOOKS.items():
        write_archive(folder / f"pg19_{split}.tar.xz", [(f"{split}/{n}.txt", text) for n, text in files.items()])
    write_titles(folder)
    write_lists(folder)
    return folder


def expected(split: str) -> dict[str, bytes]:
    return {f"{number} {TITLES[number]}": lf(BOOKS[split][number]) for number in sorted(BOOKS[split])}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("write", [write_folder, write_archives])
def test_books_are_documents_in_the_order_of_their_numbers(tmp_path: Path, write) -> None:
    corpus = load_corpus("pg19", str(write(tmp_path / "books")))
    assert corpus.name == "pg19"
    for split in SPLITS:
        assert list(texts(corpus.split(split)).items()) == list(expected(split).items())
        assert words(corpus.split(split)) == pg19.WORDS[split]
    assert content(corpus.split("all")) == b"".join(content(corpus.split(split)) for split in SPLITS)
    counts = "3 of 3 train books, 1 of 1 validation books, 2 of 2 test books"
    assert corpus.notes == (f"{counts}, each equal to its official file",)


@pytest.mark.usefixtures("small", "datasets_at_home")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_laid_out_like_that_of_the_hub_gives_the_same_books(tmp_path: Path, streaming: bool) -> None:
    tables = {
        split: [
            {
                "short_book_title": TITLES[number],
                "publication_date": 1900,
                "url": f"http://www.gutenberg.org/ebooks/{number}",
                "text": lf(text).decode(),
            }
            for number, text in files.items()
        ]
        for split, files in BOOKS.items()
    }
    path = write_hub_folder(tmp_path / "hub", tables, "parquet")
    corpus = load_corpus("pg19", f"hub:{path}", streaming=streaming)
    assert corpus.name == "pg19"
    assert [list(texts(corpus.split(split)).items()) for split in SPLITS] == [
        list(expected(split).items()) for split in SPLITS
    ]
    assert corpus.notes[0].endswith("not compared with the official files")


def test_less_than_all_is_a_subset_whose_name_counts_its_books(tmp_path: Path) -> None:
    corpus = load_corpus("pg19", str(write_folder(tmp_path / "books")))
    assert corpus.name == "pg19-subset-3-1-2"
    assert corpus.notes[0].startswith("3 of 28,602 train books, 1 of 50 validation books, 2 of 100 test books")


@pytest.mark.usefixtures("small")
def test_the_right_number_of_other_books_is_a_subset(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "books", lists=False)
    (folder / "test/4.txt").write_bytes(b"four five\r\n")
    assert load_corpus("pg19", str(folder)).name == "pg19-subset-3-1-2"


@pytest.mark.usefixtures("small")
def test_one_split_alone_is_official_and_the_others_are_said_to_be_missing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "books")
    for split in ("train", "validation"):
        for file in (folder / split).iterdir():
            file.unlink()
    corpus = load_corpus("pg19", str(folder))
    assert corpus.name == "pg19"
    assert texts(corpus.split("test")) == expected("test")
    with pytest.raises(ValueError, match=r"no split 'train'; it has test, all: no books of it in .*books"):
        corpus.split("train")


@pytest.mark.usefixtures("small")
def test_books_are_found_in_the_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_DATA", str(write_archives(tmp_path / "shared")))
    assert load_corpus("pg19").name == "pg19"
    write_folder(tmp_path / "shared/pg19", lists=False)  # a folder of its own comes before
    assert load_corpus("pg19").name == "pg19"


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (7, b"The seventh\r\nbook!\r\n", r"7\.txt: its sha256 is {found}, that of the official file {official}"),
        (7, b"The seventh\r\n", r"7\.txt: has 13 bytes, the official file 20"),
        (8, b"eight", r"8\.txt: no book of this split, says .*pg19_train_files\.tsv"),
    ],
)
def test_what_is_not_the_official_file_is_named(tmp_path: Path, number: int, text: bytes, message: str) -> None:
    folder = write_folder(tmp_path / "books")
    (folder / f"train/{number}.txt").write_bytes(text)
    hashes = {"found": hashlib.sha256(text).hexdigest(), "official": hashlib.sha256(BOOKS["train"][7]).hexdigest()}
    with pytest.raises(ValueError, match=message.format(**hashes)):
        load_corpus("pg19", str(folder))


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("/etc/7.txt", None),
        ("../train/7.txt", None),
        ("train/../7.txt", None),
        ("train/7.txt", "/etc/passwd"),
        ("test/7.txt", None),
        ("train/x.txt", None),
    ],
)
def test_strange_members_of_an_archive_are_refused(tmp_path: Path, name: str, link: str | None) -> None:
    write_archive(tmp_path / "pg19_train.tar", [(name, b"text")], link)
    with pytest.raises(ValueError, match=r"pg19_train\.tar, member '.*': must be a file train/NUMBER\.txt"):
        load_corpus("pg19", str(tmp_path))


def test_a_book_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path / "pg19_train.tar", [("train/7.txt", b"one"), ("./train/7.txt", b"two")])
    with pytest.raises(ValueError, match=r"member '\./train/7\.txt': is there twice"):
        load_corpus("pg19", str(tmp_path))


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_truncated_archive_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pg19_train.tar{suffix}"
    members = [
        (f"train/{number}.txt", hashlib.sha256(b"%d" % number).digest().hex().encode() * 9) for number in range(9)
    ]
    write_archive(path, members)
    whole = path.read_bytes()
    for size in (len(whole) // 3, 5) if suffix else (1024 + 100, 512 + 100):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"pg19_train\.tar.*: (cannot be read|damaged)"):
            load_corpus("pg19", str(tmp_path))


def test_a_book_that_is_no_text_or_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "books", lists=False)
    (folder / "train/7.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"train/7\.txt, byte 3: not UTF-8"):
        load_corpus("pg19", str(folder))
    monkeypatch.setattr(books, "MOST_BOOK_BYTES", 10)
    with pytest.raises(ValueError, match=r"train/7\.txt: more than 10 bytes are no book"):
        load_corpus("pg19", str(folder))


def test_a_training_book_cannot_test(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "books", lists=False)
    (folder / "test/99.txt").write_bytes(BOOKS["train"][7])
    with pytest.raises(ValueError, match=r"99 of the split test is also training data: 7 Seven, or More by Ann"):
        load_corpus("pg19", str(folder))


def test_no_books_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data\.path: no books of PG-19 in .*empty: needed are folders train/"):
        load_corpus("pg19", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"data\.path: no books of PG-19 in pg19 in "):
        load_corpus("pg19")


def test_a_list_of_something_else_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "books")
    (folder / "pg19_test_files.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match=r"pg19_test_files\.tsv, line 2: needs book_id, num_bytes and sha256"):
        load_corpus("pg19", str(folder))


@pytest.mark.slow
def test_the_shipped_subset(shipped_data: Path) -> None:
    corpus = load_corpus("pg19", str(shipped_data))
    assert corpus.name == "pg19-subset-528-42-15"
    counted = {split: words(corpus.split(split)) for split in SPLITS}
    assert counted == {"train": 29_545_375, "validation": 2_185_708, "test": 817_252}
    titles = [document.title for document in corpus.split("test").documents]
    assert titles[0] == "2544 From Sand Hill to Pine by Bret Harte"
    assert corpus.notes[0].endswith("each equal to its official file")
