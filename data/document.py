"""Original text as documents: byte ranges of files, or texts made up, read lazily and in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from data.compressed import is_compressed, reading

CHUNK = 1 << 20  # bytes read at a time


class AnyDocument(Protocol):
    """One document: a `Document` of a file, or text that is made as it is read (`data.letters`)."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def title(self) -> str: ...
    def chunks(self) -> Iterator[bytes]: ...
    def part(self, first: int, last: int) -> AnyDocument: ...
    def locate(self, offset: int) -> str: ...
    def identity(self) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class Document:
    """Bytes [start, stop) of a file; those named .xz, .gz or .zst are decompressed, else no byte is changed.

    title: what results of this document alone are called.
    """

    path: Path
    start: int
    stop: int
    title: str = ""

    @classmethod
    def whole(cls, path: Path, title: str | None = None) -> Document:
        """All of a file, by default under its name."""
        return cls(path, 0, text_size(path), path.name if title is None else title)

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def chunks(self) -> Iterator[bytes]:
        """The text in pieces of about `CHUNK` bytes, none of which cuts a UTF-8 character."""
        held = b""  # the last character of a block waits for the next block: it may be incomplete
        left = self.num_bytes
        with reading(self.path) as file:
            file.seek(self.start)
            while left:
                block = file.read(min(CHUNK, left))
                if not block:
                    raise ValueError(f"{self.locate(self.num_bytes - left)}: the file ends {left} bytes too early")
                left -= len(block)
                block = held + block
                cut = character_start(block, len(block) - 1) if left else len(block)
                held = block[cut:]
                if cut:
                    yield block[:cut]

    def part(self, first: int, last: int) -> Document:
        """Bytes [first, last) of this document."""
        return replace(self, start=self.start + first, stop=self.start + last)

    def locate(self, offset: int) -> str:
        """Words for the byte `offset` of this document, for messages."""
        return f"{self.path}, byte {self.start + offset}"

    def identity(self) -> list[Any]:
        """What changes when the bytes or the title do, for JSON."""
        return [*file_identity(self.path), self.start, self.stop, self.title]


@dataclass(frozen=True)
class Split:
    """A part of a corpus: documents in a fixed order, none of them empty.

    lines_are_words: each end of a line is a word of its own, as where a corpus counts an <eos> for each line.
    """

    documents: tuple[AnyDocument, ...]
    lines_are_words: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(document.num_bytes for document in self.documents)

    def chunks(self) -> Iterator[bytes]:
        """The text of all documents, one after another, in pieces that cut no UTF-8 character."""
        for document in self.documents:
            yield from document.chunks()

    def locate(self, offset: int) -> str:
        """Words for the byte `offset` of this split, for messages."""
        for document in self.documents:
            if offset < document.num_bytes:
                break
            offset -= document.num_bytes
        return document.locate(offset)


class WordCounter:
    """Counts whitespace-separated words as `len(text.split())` does, over text that comes in pieces.

    The pieces cut no UTF-8 character; bytes that are not UTF-8 count as letters. lines_are_words: ends of lines
    count too.
    """

    def __init__(self, lines_are_words: bool = False) -> None:
        self.words = 0
        self._lines_are_words = lines_are_words
        self._inside = False

    def add(self, chunk: bytes) -> None:
        text = chunk.decode("utf-8", "replace")
        continues = self._inside and not text[0].isspace()
        self.words += len(text.split()) - continues
        if self._lines_are_words:
            self.words += text.count("\n")
        self._inside = not text[-1].isspace()


def whole_documents(files: Sequence[Path]) -> list[Document]:
    """One document per file, its title the path below the folder of all; empty files are left out."""
    folder = os.path.commonpath([file.parent for file in files]) if files else ""
    documents = (Document.whole(file, file.relative_to(folder).as_posix()) for file in files)
    return [document for document in documents if document.num_bytes]


def character_start(text: bytes, position: int) -> int:
    """Where the UTF-8 character around the byte at `position` begins; `position` if it is not UTF-8."""
    for start in range(position, max(position - 4, -1), -1):
        if text[start] & 0xC0 != 0x80:
            return start
    return position


def text_size(path: Path) -> int:
    """Bytes of a file's text; what is compressed is decompressed to be counted."""
    status = file_status(path)
    if is_compressed(path):
        return _decompressed_size(path, status.st_size, status.st_mtime_ns)
    return status.st_size


def file_identity(path: Path) -> list[Any]:
    """What changes when the content of a file does, for JSON."""
    path = path.resolve()
    status = file_status(path)
    return [str(path), status.st_size, status.st_mtime_ns]


def file_status(path: Path) -> os.stat_result:
    """`path.stat()`; ValueError if it is refused."""
    try:
        return path.stat()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


@lru_cache
def _decompressed_size(path: Path, compressed_size: int, mtime_ns: int) -> int:
    with reading(path) as file:
        return sum(len(block) for block in iter(lambda: file.read(CHUNK), b""))
