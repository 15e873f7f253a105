"""Corpora by name: which bytes train, which validate, and what a result on them must be called.

A new corpus is one function and its entry in `CORPORA`.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.document import Document, Split, whole_documents
from data.files import find_file, find_files, search_folders, searched
from data.holdout import MANY_DOCUMENTS, hold_out, part
from data.letters import ALPHABET, Letters

DEFAULT_VALIDATION = "0.1"
DEFAULT_ALPHABET = 4
IID_LETTERS = 10_000_000

ENWIK8_BYTES = 100_000_000
ENWIK8_MD5 = "a1fa5ffddb56f4953e227637dabbb36a"
ENWIK8_HEAD = b"<mediawiki xmlns="
ENWIK8_FILES = ("enwik8", "enwik8.xz", "enwik8.gz")


@dataclass(frozen=True)
class Corpus:
    """`name`: what a result must be called (a prefix of enwik8 is not enwik8). `splits`: split name -> text.

    Every corpus has `train`, `validation` and `all`; no byte of a file is in two splits but for `all`.
    """

    name: str
    splits: dict[str, Split]

    def split(self, name: str) -> Split:
        """The split of that name; ValueError if there is none or it is empty."""
        if name not in self.splits:
            raise ValueError(f"corpus {self.name} has no split {name!r}; it has {', '.join(self.splits)}")
        if not self.splits[name].num_bytes:
            raise ValueError(f"corpus {self.name}: the text is too short, nothing is left for the split {name!r}")
        return self.splits[name]


def load_corpus(
    name: str,
    path: str | None = None,
    validation: str | float = DEFAULT_VALIDATION,
    alphabet: int = DEFAULT_ALPHABET,
) -> Corpus:
    """The corpus of that name. Text is read now only to check official files and to measure compressed ones.

    path: a file, folder or pattern, looked up in the current folder, then in $LMTRAIN_DATA.
    validation: the share of the text, at its end, that validates; or the path of a text that does.
    alphabet: letters of the corpus `iid`; others have none to choose.
    ValueError says what is missing, empty or too short, and where it was looked for.
    """
    if name not in CORPORA:
        raise ValueError(f"data.corpus: no corpus {name!r}; known: {', '.join(CORPORA)}")
    if name == "iid":
        return iid(path, str(validation), alphabet)
    return CORPORA[name](path, str(validation))


def text(path: str | None, validation: str) -> Corpus:
    """Your own text: one file, a folder with all files below it, or a pattern such as `books/*.txt.xz`.

    Each file is one document, in order of path; empty files are left out. Bytes stay as they are, CRLF
    included.
    """
    if path is None:
        raise ValueError("data.path: the corpus `text` needs the path of a file or folder, or a pattern")
    documents = whole_documents(find_files(path, "data.path"))
    if not documents:
        raise ValueError(f"data.path: {path} holds no text")
    return Corpus("text", hold_out(documents, validation))


def enwik8(path: str | None, validation: str) -> Corpus:
    """The first 10^8 bytes of an English Wikipedia dump, one stream: 90M train, 5M validation, 5M test.

    A shorter file is taken for a prefix and split by the same shares. Its name tells the length, for its
    numbers are not enwik8 numbers.
    """
    if validation != DEFAULT_VALIDATION:
        raise ValueError("data.validation: enwik8 has official splits, the setting has no effect there")
    document = Document.whole(_find_enwik8(path))
    size = document.num_bytes
    if b"".join(part([document], 0, len(ENWIK8_HEAD)).chunks()) != ENWIK8_HEAD:
        raise ValueError(f"{document.path}: not enwik8, which begins with {ENWIK8_HEAD.decode()}")
    if size > ENWIK8_BYTES:
        raise ValueError(f"{document.path}: {size:,} bytes are more than the {ENWIK8_BYTES:,} of enwik8")
    if size == ENWIK8_BYTES and _md5(document) != ENWIK8_MD5:
        raise ValueError(f"{document.path}: has the size of enwik8, but not its md5 {ENWIK8_MD5}")
    splits = {
        "train": part([document], 0, size * 90 // 100),
        "validation": part([document], size * 90 // 100, size * 95 // 100),
        "test": part([document], size * 95 // 100, size),
        "all": Split((document,)),
    }
    return Corpus("enwik8" if size == ENWIK8_BYTES else f"enwik8-prefix{_short_size(size)}", splits)


def stdlib(path: str | None, validation: str) -> Corpus:
    """The sources of Python's own library on this machine: real text, 8 MB of it, without a download.

    One document per .py file, in order of path. To be the same text wherever a version of Python comes from,
    it leaves out what distributors ship apart or alter; and tests and generated tables.
    """
    if path is not None:
        raise ValueError("data.path: the corpus `stdlib` finds its files itself; your own files are the corpus `text`")
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = whole_documents(sorted(_library_files(root)))
    if len(documents) < MANY_DOCUMENTS:
        version = platform.python_version()
        raise ValueError(f"data.corpus: Python {version} has no library sources in {root}; use the corpus `text`")
    return Corpus("stdlib", hold_out(documents, validation))


def iid(path: str | None, validation: str, alphabet: int = DEFAULT_ALPHABET) -> Corpus:
    """Ten million letters, drawn independently and uniformly from the first `alphabet` ones; the same in every run.

    Nobody predicts them better than by log2(alphabet) bits per byte, but who sees them.
    """
    if path is not None:
        raise ValueError("data.path: the corpus `iid` is drawn, not read; your own files are the corpus `text`")
    if not 2 <= alphabet <= len(ALPHABET):
        raise ValueError(f"data.alphabet: must be from 2 to {len(ALPHABET)} letters, not {alphabet}")
    return Corpus(f"iid{alphabet}", hold_out([Letters(alphabet, 0, IID_LETTERS)], validation))


CORPORA: dict[str, Callable[[str | None, str], Corpus]] = {
    "text": text,
    "enwik8": enwik8,
    "stdlib": stdlib,
    "iid": iid,
}


def _find_enwik8(path: str | None) -> Path:
    file = find_file([path] if path else ENWIK8_FILES)
    if file is None and path:
        raise ValueError(f"data.path: no file {path!r}{searched(path)}")
    if file is None:
        near = sorted({file.name for folder in search_folders() for file in folder.glob("enwik8*") if file.is_file()})
        hint = f"set data.path for {', '.join(near)}" if near else "get enwik8.zip (mattmahoney.net/dc) and unpack it"
        raise ValueError(f"data.corpus: no file {' or '.join(ENWIK8_FILES)}{searched('enwik8')}; {hint}")
    return file


def _md5(document: Document) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in document.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _short_size(size: int) -> str:
    return f"{round(size / 1e6)}m" if size >= 1_000_000 else f"{round(size / 1e3)}k"


_LIBRARY_LEFT_OUT = {
    # in packages of their own (Debian: idle, -distutils, -lib2to3, -tk, -venv), or gone since some version
    *("distutils", "ensurepip", "idlelib", "lib2to3", "macholib", "tkinter", "turtledemo", "venv"),
    # character tables, the text of help()
    *("encodings", "pydoc_data"),
    *("idle_test", "test", "tests"),
    # not Python's own
    *("__pycache__", "dist-packages", "lib-dynload", "site-packages"),
}
_OF_ONE_BUILD = ("_distutils_system_mod", "_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def _library_files(root: Path) -> Iterator[Path]:
    for parent, children, files in os.walk(root):
        children[:] = [c for c in children if c not in _LIBRARY_LEFT_OUT and not c.startswith(_OF_ONE_BUILD)]
        yield from (Path(parent) / f for f in files if f.endswith(".py") and not f.startswith(_OF_ONE_BUILD))
