"""Texts taken out of archives, tables and folders once, and kept in the cache as plain bytes.

A kept text is a folder: text.bin, its documents end to end; documents.json, where each one ends, its title and a digest
of its content, for each of its parts. What was checked on the way in (checksums, columns, UTF-8) need not be again.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.cache import cache_folder, open_or_make
from data.disk import sha256_json, sync_file
from data.document import Document, WordCounter

VERSION = 1
TEXT, DOCUMENTS = "text.bin", "documents.json"
DIGEST_BYTES = 16
Texts = Iterable[tuple[str, str, bytes]]
"""(part, title, UTF-8 text) of each document; the documents of a part follow each other."""


@dataclass(frozen=True, slots=True)
class KeptDocument(Document):
    """A document of a kept text. key: names the text, wherever the cache is; digest: of the content."""

    key: str = ""
    digest: bytes = b""

    def part(self, first: int, last: int) -> KeptDocument:
        """Bytes [first, last) of this document."""
        return replace(self, start=self.start + first, stop=self.start + last, digest=b"")

    def locate(self, offset: int) -> str:
        """Words for the byte `offset` of this document, for messages."""
        return f"{self.title}, byte {offset} (byte {self.start + offset} of {self.path})"

    def identity(self) -> list[Any]:
        """What changes when the bytes or the title do, for JSON."""
        return [self.key, self.start, self.stop, self.title]


@dataclass(frozen=True)
class KeptPart:
    """The documents of one part of a text. empty: documents without text, left out; lines: ends of lines."""

    documents: tuple[KeptDocument, ...]
    words: int
    lines: int
    empty: int


def keep(name: str, source: list[Any], read: Callable[[], Texts], cache: str | Path | None) -> dict[str, KeptPart]:
    """The parts of a text, from the cache if they are there, else as `read` gives them.

    name: of the text, for people; source: JSON that changes when the text does; cache: None means `default_cache()`.
    ValueError from `read`, or if the cache cannot be written.
    """
    key = sha256_json([VERSION, name, source])[:16]
    folder = cache_folder(cache) / "texts" / f"{name}-{key}"
    try:
        return open_or_make(folder, lambda there: _open(there, key), lambda new: _write(new, read()))
    except OSError as error:
        raise ValueError(
            f"data.cache: cannot write the text of {name} into {folder.parent} ({error.strerror}); "
            "choose another folder with data.cache or $LMTRAIN_CACHE"
        ) from error


def content_digest(content: Iterable[bytes]) -> bytes:
    """Equal for equal texts, however they are cut into pieces."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in content:
        digest.update(piece)
    return digest.digest()


@dataclass
class _Part:
    """What is noted of a part while it is written."""

    start: int
    stops: array = field(default_factory=lambda: array("q"))
    titles: list[str] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    words: int = 0
    lines: int = 0
    empty: int = 0

    def add(self, title: str, text: bytes, stop: int) -> None:
        counter = WordCounter()
        counter.add(text)
        self.stops.append(stop)
        self.titles.append(title)
        self.digests += content_digest([text])
        self.words += counter.words
        self.lines += text.count(b"\n")

    def to_json(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "stops": list(self.stops),
            "titles": self.titles,
            "digests": self.digests.hex(),
            "words": self.words,
            "lines": self.lines,
            "empty": self.empty,
        }


def _write(folder: Path, texts: Texts) -> None:
    folder.mkdir()
    parts: dict[str, _Part] = {}
    size, last = 0, None
    with (folder / TEXT).open("wb") as file:
        for name, title, text in texts:
            if name != last:
                assert name not in parts, f"the documents of {name} do not follow each other"
                parts[name] = _Part(start=size)
            part, last = parts[name], name
            if text:
                file.write(text)
                size += len(text)
                part.add(title, text, size)
            else:
                part.empty += 1
        sync_file(file)
    documents = {name: part.to_json() for name, part in parts.items()}
    content = {"documents": documents, "checksum": sha256_json(documents)}
    with (folder / DOCUMENTS).open("wb") as file:
        file.write(json.dumps(content).encode())
        sync_file(file)


def _open(folder: Path, key: str) -> dict[str, KeptPart]:
    """ValueError if the text is damaged."""
    try:
        content = json.loads((folder / DOCUMENTS).read_bytes())
        documents, size = content["documents"], (folder / TEXT).stat().st_size
        intact = content["checksum"] == sha256_json(documents)
        intact = intact and size == max((stop for part in documents.values() for stop in part["stops"]), default=0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: damaged ({error})") from error
    if not intact:
        raise ValueError(f"{folder}: damaged, its sizes or its checksum are wrong")
    return {name: _part(folder / TEXT, key, part) for name, part in documents.items()}


def _part(path: Path, key: str, part: dict[str, Any]) -> KeptPart:
    digests = bytes.fromhex(part["digests"])
    documents = (
        KeptDocument(path, start, stop, title, key, digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES])
        for i, ((start, stop), title) in enumerate(zip(pairwise([part["start"], *part["stops"]]), part["titles"]))
    )
    return KeptPart(tuple(documents), part["words"], part["lines"], part["empty"])
