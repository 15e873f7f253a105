"""PG-19: books of Project Gutenberg from before 1919 (Rae et al., 2020), each a document with its title.

Line ends become LF, as whoever opens the files in text mode reads them; nothing else changes.
"""

from __future__ import annotations

from pathlib import Path

from data.corpora.books import SPLITS, Book, OfficialList, books_of, files_of, official_list, titles_of
from data.corpora.contract import Corpus, Source
from data.corpora.hub import dataset_identity, dataset_rows
from data.corpora.table import text_of
from data.document import AnyDocument, Split, file_identity
from data.files import find_folder, search_folders, searched
from data.holdout import refuse_overlap
from data.kept import KeptPart, Texts, keep

HUB = "hub:"
BOOKS = {"train": 28_602, "validation": 50, "test": 100}
WORDS = {"train": 1_973_136_207, "validation": 3_007_061, "test": 6_966_499}


def pg19(source: Source) -> Corpus:
    """The splits whose books are there; `pg19` if each is whole, else `pg19-subset-` and the numbers of books.

    data.path: a folder laid out as the official one (`train/NUMBER.txt`, `validation/`, `test/`) or with the archives
    `pg19_train.tar.xz` and so on; null = `pg19`, else the current folder or $LMTRAIN_DATA itself; `hub:owner/name` =
    a dataset of the hub, or a folder laid out like one, with the columns of PG-19 there. Whole means: the official
    number of books and of words. Where lists of the official files lie beside them, each book must be one of these.
    """
    if source.path is not None and source.path.startswith(HUB):
        parts, compared = _from_hub(source.path.removeprefix(HUB), source), False
    else:
        parts, compared = _from_files(_folder(source.path), source)
    ordered = {split: sorted(parts[split].documents, key=_number) for split in SPLITS if split in parts}
    splits = {split: Split(tuple(documents)) for split, documents in ordered.items()}
    if "train" in splits:
        refuse_overlap(splits, "data.path: ")
    splits["all"] = Split(tuple(document for documents in ordered.values() for document in documents))
    absent = {split: f"no books of it in {source.path or 'the folder'}" for split in SPLITS if split not in parts}
    counts = [len(parts[split].documents) if split in parts else 0 for split in SPLITS]
    books = ", ".join(f"{count:,} of {BOOKS[split]:,} {split} books" for split, count in zip(SPLITS, counts))
    how = "each equal to its official file" if compared else "not compared with the official files"
    whole = all(_is_whole(split, part) for split, part in parts.items())
    name = "pg19" if whole else f"pg19-subset-{'-'.join(map(str, counts))}"
    return Corpus(name, splits, absent, (f"{books}, {how}",))


def _is_whole(split: str, part: KeptPart) -> bool:
    return len(part.documents) == BOOKS[split] and part.words == WORDS[split]


def _number(document: AnyDocument) -> int:
    """Titles begin with the number of the book."""
    return int(document.title.split()[0])


def _folder(path: str | None) -> Path:
    """The folder with the books or the archives of them. ValueError if there is none."""
    if path is not None:
        folders = [folder] if (folder := find_folder(path)) else []
    else:
        folders = [folder / name for folder in search_folders() for name in ("pg19", ".")]
    for folder in folders:
        if any(files_of(folder, split) for split in SPLITS):
            return folder
    where = searched(path or "pg19")
    raise ValueError(
        f"data.path: no books of PG-19 in {path or 'pg19'}{where}: needed are folders train/, validation/, test/ of "
        "NUMBER.txt, or archives pg19_train.tar.xz and so on of them; or set it to hub: and the name of a dataset"
    )


def _from_files(folder: Path, source: Source) -> tuple[dict[str, KeptPart], bool]:
    """The books of a folder by split, and whether lists of the official files were there to compare them with."""
    files = {split: found for split in SPLITS if (found := files_of(folder, split))}
    lists = {split: official_list(folder, split) for split in files}
    parts = {split: _kept(folder, split, files[split], lists[split], source) for split in files}
    return parts, all(lists.values())


def _kept(folder: Path, split: str, files: list[Path], official: OfficialList | None, source: Source) -> KeptPart:
    titles, beside = titles_of(folder)

    def read() -> Texts:
        for book in books_of(files, split):
            if official:
                official.check(book)
            yield split, _title(book.number, titles.get(book.number)), _with_lf(book)

    lists = [*beside, *([official.path] if official else [])]
    parts = keep(f"pg19-{split}", [file_identity(path) for path in [*files, *lists]], read, source.cache)
    if split not in parts or not parts[split].documents:
        raise ValueError(f"data.path: {files[0]} holds no books")
    return parts[split]


def _from_hub(path: str, source: Source) -> dict[str, KeptPart]:
    def read() -> Texts:
        for split, number, row in dataset_rows(source, path):
            where = f"{path}, row {number} of {split}"
            address, title = (text_of(row, column, where).decode() for column in ("url", "short_book_title"))
            book = address.rstrip("/").rpartition("/")[2]
            if not book.isdecimal():
                raise ValueError(f"{where}: its url {address!r} does not end in the number of a book")
            yield split, _title(int(book), title), _with_lf(Book(int(book), where, text_of(row, "text", where)))

    parts = keep("pg19", dataset_identity(source, path), read, source.cache)
    return {split: part for split, part in parts.items() if split in SPLITS}


def _title(number: int, title: str | None) -> str:
    return f"{number} {title}" if title else str(number)


def _with_lf(book: Book) -> bytes:
    """The text, which must be UTF-8, with LF for CRLF and for CR."""
    try:
        book.content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{book.where}, byte {error.start}: not UTF-8") from None
    return book.content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
