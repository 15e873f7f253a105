"""enwik8 and text8: one stream of 10^8 bytes each, of which 90M train, 5M validate and 5M test."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.corpora.contract import Corpus, Source
from data.document import Document, Split
from data.files import find_file, search_folders, searched
from data.holdout import part

SIZE = 100_000_000
ENWIK8_HEAD = b"<mediawiki xmlns="
TEXT8_ALPHABET = b"abcdefghijklmnopqrstuvwxyz "


@dataclass(frozen=True)
class _Official:
    """The file: its name, its md5, and what every prefix of it must satisfy (ValueError if not)."""

    name: str
    md5: str
    check: Callable[[Document], None]


def enwik8(source: Source) -> Corpus:
    """The first 10^8 bytes of an English Wikipedia dump.

    A shorter file is taken for a prefix and split by the same shares. Its name tells the length, for its
    numbers are not enwik8 numbers.
    """
    return _stream(ENWIK8, source)


def text8(source: Source) -> Corpus:
    """10^8 letters and spaces, the text of a later part of the cleaned dump; a shorter file as for enwik8."""
    return _stream(TEXT8, source)


def _begins_as_enwik8(document: Document) -> None:
    if b"".join(part([document], 0, len(ENWIK8_HEAD)).chunks()) != ENWIK8_HEAD:
        raise ValueError(f"{document.path}: not enwik8, which begins with {ENWIK8_HEAD.decode()}")


def _is_letters_and_spaces(document: Document) -> None:
    offset = 0
    for chunk in document.chunks():
        if others := chunk.translate(None, TEXT8_ALPHABET):
            offset += chunk.index(others[:1])
            raise ValueError(
                f"{document.locate(offset)}: not text8, which has no {others[:1]!r}: only a to z and spaces"
            )
        offset += len(chunk)


ENWIK8 = _Official("enwik8", "a1fa5ffddb56f4953e227637dabbb36a", _begins_as_enwik8)
TEXT8 = _Official("text8", "3bea1919949baf155f99411df5fada7e", _is_letters_and_spaces)


def _stream(official: _Official, source: Source) -> Corpus:
    document = Document.whole(_find(official.name, source.path))
    size = document.num_bytes
    if not size:
        raise ValueError(f"{document.path}: empty")
    official.check(document)
    if size > SIZE:
        raise ValueError(f"{document.path}: {size:,} bytes are more than the {SIZE:,} of {official.name}")
    if size == SIZE and _md5(document) != official.md5:
        raise ValueError(f"{document.path}: has the size of {official.name}, but not its md5 {official.md5}")
    splits = {
        "train": part([document], 0, size * 90 // 100),
        "validation": part([document], size * 90 // 100, size * 95 // 100),
        "test": part([document], size * 95 // 100, size),
        "all": Split((document,)),
    }
    return Corpus(official.name if size == SIZE else f"{official.name}-prefix{_short_size(size)}", splits)


def _find(name: str, path: str | None) -> Path:
    names = [name, *(f"{name}{suffix}" for suffix in (".xz", ".gz", ".zst"))]
    file = find_file([path] if path else names)
    if file is None and path:
        raise ValueError(f"data.path: no file {path!r}{searched(path)}")
    if file is None:
        near = sorted({file.name for folder in search_folders() for file in folder.glob(f"{name}*") if file.is_file()})
        hint = f"set data.path for {', '.join(near)}" if near else f"get {name}.zip (mattmahoney.net/dc) and unpack it"
        raise ValueError(f"data.corpus: no file {' or '.join(names)}{searched(name)}; {hint}")
    return file


def _md5(document: Document) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in document.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _short_size(size: int) -> str:
    return f"{round(size / 1e6)}m" if size >= 1_000_000 else f"{round(size / 1e3)}k"
