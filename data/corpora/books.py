"""The files of PG-19: books in folders or archives, the official lists of them, their titles."""

from __future__ import annotations

import csv
import hashlib
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.compressed import reading
from data.document import CHUNK

SPLITS = ("train", "validation", "test")
MOST_BOOK_BYTES = 1 << 28
_MEMBER = re.compile(r"(?:\./)?(train|validation|test)/(\d+)\.txt")
_BOOK = re.compile(r"(\d+)\.txt")


class Book(NamedTuple):
    """A book as it lies there: its number, where that is (for messages), its bytes."""

    number: int
    where: str
    content: bytes


@dataclass(frozen=True)
class OfficialList:
    """The official files of a split: number -> (bytes, sha256), and the file that says so."""

    path: Path
    files: Mapping[int, tuple[int, str]]

    def check(self, book: Book) -> None:
        """ValueError, with expected and found, unless this is that official file."""
        if book.number not in self.files:
            raise ValueError(f"{book.where}: no book of this split, says {self.path}")
        size, sha256 = self.files[book.number]
        if len(book.content) != size:
            raise ValueError(f"{book.where}: has {len(book.content):,} bytes, the official file {size:,}")
        found = hashlib.sha256(book.content).hexdigest()
        if found != sha256:
            raise ValueError(f"{book.where}: its sha256 is {found}, that of the official file {sha256}")


def files_of(folder: Path, split: str) -> list[Path]:
    """What holds the books of a split: `SPLIT/NUMBER.txt`, else the archive `pg19_SPLIT.tar`, compressed or not."""
    files = [file for file in folder.glob(f"{split}/*.txt") if _BOOK.fullmatch(file.name)]
    if files:
        return sorted(files, key=lambda file: int(file.stem))
    return sorted(folder.glob(f"pg19_{split}.tar*"))[:1]


def books_of(files: list[Path], split: str) -> Iterator[Book]:
    """The books in files as `files_of` finds them, in their order. ValueError names what is damaged or strange."""
    for file in files:
        if _BOOK.fullmatch(file.name):
            with reading(file) as book:
                yield Book(int(file.stem), str(file), _bounded(book.read(MOST_BOOK_BYTES + 1), str(file)))
        else:
            yield from _archived(file, split)


def official_list(folder: Path, split: str) -> OfficialList | None:
    """The list `pg19_SPLIT_files.tsv` (book_id, num_bytes, sha256) in the folder or the one above, if it is there."""
    path = _beside(folder, f"pg19_{split}_files.tsv")
    if path is None:
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        try:
            files = {int(row["book_id"]): (int(row["num_bytes"]), row["sha256"]) for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {rows.line_num}: needs book_id, num_bytes and sha256 ({error})") from None
    return OfficialList(path, files)


def titles_of(folder: Path) -> tuple[dict[int, str], list[Path]]:
    """Number -> title, and the files that say so: metadata.csv (number, title, year, url) or pg19_manifest.tsv.

    They lie in the folder, or in the one above.
    """
    manifest, metadata = _beside(folder, "pg19_manifest.tsv"), _beside(folder, "metadata.csv")
    found: dict[int, str] = {}
    if manifest:
        with manifest.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            found |= {int(row["book_id"]): row["title"] for row in rows}
    if metadata:
        with metadata.open(newline="", encoding="utf-8") as file:
            found |= {int(row[0]): row[1] for row in csv.reader(file) if len(row) > 1 and row[0].isdecimal()}
    return found, [path for path in (manifest, metadata) if path]


def _beside(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder.parent / name) if path.is_file()), None)


def _archived(path: Path, split: str) -> Iterator[Book]:
    """The books of an archive, read from front to back; nothing is ever written under a name of its own."""
    seen: set[int] = set()
    with reading(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|", bufsize=CHUNK) as archive:
                for member in archive:
                    where = f"{path}, member {member.name!r}"
                    if member.isdir():
                        continue
                    name = _MEMBER.fullmatch(member.name)
                    if name is None or not member.isfile() or name[1] != split:
                        raise ValueError(f"{where}: must be a file {split}/NUMBER.txt, no link and in no other folder")
                    if member.size > MOST_BOOK_BYTES:
                        raise ValueError(f"{where}: {member.size:,} bytes are no book")
                    if int(name[2]) in seen:
                        raise ValueError(f"{where}: is there twice")
                    seen.add(int(name[2]))
                    content = archive.extractfile(member)
                    assert content is not None, "a regular file"
                    yield Book(int(name[2]), where, content.read())
        except tarfile.TarError as error:
            raise ValueError(f"{path}: damaged, no whole archive ({error})") from error
        while file.read(CHUNK):  # to its end, where the check sum of the compression is
            pass


def _bounded(content: bytes, where: str) -> bytes:
    if len(content) > MOST_BOOK_BYTES:
        raise ValueError(f"{where}: more than {MOST_BOOK_BYTES:,} bytes are no book")
    return content
