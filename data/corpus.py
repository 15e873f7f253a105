"""Corpora by name: which bytes train, which validate, and what a result on them must be called.

A new corpus is one function and its line in `CORPORA`. Splits never share a byte.
"""

import glob
import hashlib
import math
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from data.document import Document, Split, character_start, same_file_key

DEFAULT_VALIDATION = "0.1"
MANY_DOCUMENTS = 20  # from here on a split falls on a document border

ENWIK8_BYTES = 100_000_000
ENWIK8_MD5 = "a1fa5ffddb56f4953e227637dabbb36a"
ENWIK8_HEAD = b"<mediawiki xmlns="


@dataclass(frozen=True)
class Corpus:
    """`name` is what a result must be called (a prefix of enwik8 is not enwik8); `splits` maps split names to text."""

    name: str
    splits: dict[str, Split]

    def split(self, name: str) -> Split:
        """The named split; ValueError if there is none or it is empty."""
        if name not in self.splits:
            raise ValueError(f"corpus {self.name} has no split {name!r}; it has {', '.join(self.splits)}")
        if not self.splits[name].num_bytes:
            raise ValueError(f"corpus {self.name}: the {name} split is empty; the text is too short")
        return self.splits[name]


def load_corpus(name: str, path: str | None = None, validation: str | float = DEFAULT_VALIDATION) -> Corpus:
    """The corpus of that name. Nothing is read yet, except to check the official files and to measure compressed ones.

    path: file, folder or pattern, looked up in the current folder, then in $LMTRAIN_DATA.
    validation: the share of the text, at its end, that validates; or the path of a text that does.
    Every corpus has the splits `train`, `validation` and `all`. ValueError for whatever is missing, empty or too short.
    """
    if name not in CORPORA:
        raise ValueError(f"data.corpus: no corpus {name!r}; known: {', '.join(CORPORA)}")
    return CORPORA[name](path, str(validation))


def text(path: str | None, validation: str) -> Corpus:
    """Your own text: one file, a folder (every file below it, hidden ones excepted), or a pattern such as `books/*.txt.xz`.

    Each file is one document, in order of path; empty files are left out. Bytes are kept as they are, CRLF included.
    """
    if path is None:
        raise ValueError("data.path: the corpus `text` needs the path of a file or folder, or a pattern")
    return Corpus("text", hold_out(_documents(path, "data.path"), validation))


def enwik8(path: str | None, validation: str) -> Corpus:
    """The first 10^8 bytes of an English Wikipedia dump (Hutter prize): 90M train, 5M validation, 5M test, one stream.

    A shorter file is taken for a prefix, split 90/5/5 %, and bears its length in its name: its numbers are no enwik8 numbers.
    """
    if validation != DEFAULT_VALIDATION:
        raise ValueError("data.validation: enwik8 has official splits, this setting has no effect there")
    document = Document.whole(_find_enwik8(path))
    size = document.num_bytes
    if (
        next(replace(document, stop=min(size, len(ENWIK8_HEAD))).chunks(), b"") != ENWIK8_HEAD[:size]
        or not size
    ):
        raise ValueError(f"{document.path}: not enwik8, which begins with {ENWIK8_HEAD.decode()}")
    if size > ENWIK8_BYTES:
        raise ValueError(f"{document.path}: {size:,} bytes are more than enwik8's {ENWIK8_BYTES:,}")
    if size == ENWIK8_BYTES and _md5(document) != ENWIK8_MD5:
        raise ValueError(f"{document.path}: has the size of enwik8 but not its md5 {ENWIK8_MD5}")
    name = "enwik8" if size == ENWIK8_BYTES else f"enwik8-prefix{_short_size(size)}"
    borders = [0, size * 90 // 100, size * 95 // 100, size]
    parts = {
        part: _split([document], borders[i], borders[i + 1])
        for i, part in enumerate(("train", "validation", "test"))
    }
    return Corpus(name, {**parts, "all": Split((document,))})


def stdlib(path: str | None, validation: str) -> Corpus:
    """The sources of Python's own standard library on this machine: real text, about 8 MB, with no download.

    One document per .py file, in order of path. Left out, so that one version of Python gives one corpus wherever it comes
    from: packages that distributors ship apart or not at all, generated tables, tests, and what depends on the build.
    """
    if path is not None:
        raise ValueError(
            "data.path: the corpus `stdlib` finds its files itself; for files of yours, data.corpus is `text`"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = _whole(sorted(_library_files(root), key=Path.as_posix))
    if len(documents) < MANY_DOCUMENTS:
        raise ValueError(
            f"data.corpus: Python {platform.python_version()} has no library sources in {root}; use `text`"
        )
    return Corpus("stdlib", hold_out(documents, validation))


CORPORA: dict[str, Callable[[str | None, str], Corpus]] = {"text": text, "enwik8": enwik8, "stdlib": stdlib}


def hold_out(documents: Sequence[Document], validation: str) -> dict[str, Split]:
    """The splits `train`, `validation` and `all` (of `documents`), `validation` being a share of the bytes or a path.

    A share s is held out at the end: of n bytes train has the first floor((1 - s) n), moved back to the start of a UTF-8
    character. From `MANY_DOCUMENTS` documents on, the cut is the document border nearest to there (of two, the earlier).
    """
    whole = Split(tuple(documents))
    share = _share(validation)
    if share is None:
        held_out = Split(tuple(_documents(validation, "data.validation")))
        training_files = {same_file_key(document.path) for document in documents}
        for document in held_out.documents:
            if same_file_key(document.path) in training_files:
                raise ValueError(f"data.validation: {document.path} is also training data")
        return {"train": whole, "validation": held_out, "all": whole}
    cut = _cut(documents, math.floor((1 - share) * whole.num_bytes))
    return {
        "train": _split(documents, 0, cut),
        "validation": _split(documents, cut, whole.num_bytes),
        "all": whole,
    }


def _share(validation: str) -> Fraction | None:
    try:
        value = float(validation)
    except ValueError:
        return None
    if not 0 < value < 1:
        raise ValueError(f"data.validation: a share must be between 0 and 1, not {validation}")
    return Fraction(validation)


def _cut(documents: Sequence[Document], position: int) -> int:
    borders = [0]
    for document in documents:
        borders.append(borders[-1] + document.num_bytes)
    if len(documents) >= MANY_DOCUMENTS:
        return min(borders[1:-1], key=lambda border: abs(border - position))
    index = max(i for i, border in enumerate(borders[:-1]) if border <= position)
    document, offset = documents[index], documents[index].start + position - borders[index]
    first = max(document.start, offset - 3)
    around = b"".join(replace(document, start=first, stop=offset + 1).chunks())
    return position - (offset - first) + character_start(around, offset - first)


def _split(documents: Sequence[Document], start: int, stop: int) -> Split:
    """Bytes [start, stop) of the stream of documents."""
    parts = []
    for document in documents:
        first, last = max(start, 0), min(stop, document.num_bytes)
        if first < last:
            parts.append(replace(document, start=document.start + first, stop=document.start + last))
        start, stop = start - document.num_bytes, stop - document.num_bytes
    return Split(tuple(parts))


def _documents(path: str, key: str) -> list[Document]:
    documents = _whole(find_files(path, key))
    if not documents:
        raise ValueError(f"{key}: {path} holds no text; every file found is empty")
    return documents


def _whole(files: Sequence[Path]) -> list[Document]:
    return [document for document in map(Document.whole, files) if document.num_bytes]


def find_files(path: str, key: str) -> list[Path]:
    """The files that `path` means, sorted: itself, all below a folder, or the matches of a pattern. ValueError names `key`."""
    folders = search_folders()
    for folder in folders:
        candidate = folder / Path(path).expanduser()
        if candidate.is_file():
            return [candidate]
        if candidate.is_dir():
            found = list(_files_below(candidate))
        else:
            found = [file for file in map(Path, glob.glob(str(candidate), recursive=True)) if file.is_file()]
        if found:
            return sorted(found, key=Path.as_posix)
    raise ValueError(f"{key}: no file {path!r} in {_names(folders)}")


def search_folders() -> list[Path]:
    """Where a relative path is looked up, in this order."""
    shared = os.environ.get("LMTRAIN_DATA")
    return [Path.cwd(), *([Path(shared)] if shared else [])]


def _names(folders: Sequence[Path]) -> str:
    return " or ".join(map(str, folders)) + ("" if len(folders) > 1 else " ($LMTRAIN_DATA is not set)")


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, children, files in os.walk(folder):
        children[:] = [child for child in children if not child.startswith(".")]
        yield from (Path(parent) / file for file in files if not file.startswith("."))


def _find_enwik8(path: str | None) -> Path:
    folders = search_folders()
    names = [path] if path else ["enwik8", "enwik8.xz", "enwik8.gz"]
    for candidate in (folder / Path(name).expanduser() for folder in folders for name in names):
        if candidate.is_file():
            return candidate
    if path:
        raise ValueError(f"data.path: no file {path!r} in {_names(folders)}")
    near = sorted(file.name for folder in folders for file in folder.glob("enwik8*") if file.is_file())
    hint = (
        f"; set data.path for {', '.join(near)}"
        if near
        else "; get enwik8.zip (mattmahoney.net/dc) and unpack it"
    )
    raise ValueError(f"data.corpus: no file {' or '.join(names)} in {_names(folders)}{hint}")


def _md5(document: Document) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in document.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _short_size(size: int) -> str:
    return f"{round(size / 1e6)}m" if size >= 1_000_000 else f"{round(size / 1e3)}k"


# Shipped apart by distributors (Debian: python3-tk, -distutils, -lib2to3, idle, -venv) or removed over the versions;
# character tables and the text of help(); tests; packages that are not Python's.
_LIBRARY_LEFT_OUT = {
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "venv"),
    *("encodings", "pydoc_data"),
    *("idle_test", "test", "tests"),
    *("__pycache__", "dist-packages", "lib-dynload", "site-packages"),
}
_BUILD_DEPENDENT = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def _library_files(root: Path) -> Iterator[Path]:
    for parent, children, files in os.walk(root):
        children[:] = [
            c for c in children if c not in _LIBRARY_LEFT_OUT and not c.startswith(_BUILD_DEPENDENT)
        ]
        yield from (
            Path(parent) / f for f in files if f.endswith(".py") and not f.startswith(_BUILD_DEPENDENT)
        )
