"""The sources of Python's own library on this machine: real text, 8 MB of it, without a download."""

import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.corpora.contract import Corpus, Source
from data.document import whole_documents
from data.holdout import MANY_DOCUMENTS, hold_out

_LEFT_OUT = {
    # in packages of their own (Debian: idle, -distutils, -lib2to3, -tk, -venv), or gone since some version
    *("distutils", "ensurepip", "idlelib", "lib2to3", "macholib", "tkinter", "turtledemo", "venv"),
    # character tables, the text of help()
    *("encodings", "pydoc_data"),
    *("idle_test", "test", "tests"),
    # not Python's own
    *("__pycache__", "dist-packages", "lib-dynload", "site-packages"),
}
_OF_ONE_BUILD = ("_distutils_system_mod", "_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def stdlib(source: Source) -> Corpus:
    """One document per .py file, in order of path.

    To be the same text wherever a version of Python comes from, it leaves out what distributors ship apart or alter;
    and tests and generated tables.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = whole_documents(sorted(_library_files(root)))
    if len(documents) < MANY_DOCUMENTS:
        version = platform.python_version()
        raise ValueError(f"data.corpus: Python {version} has no library sources in {root}; use the corpus `text`")
    return Corpus("stdlib", hold_out(documents, source.validation))


def _library_files(root: Path) -> Iterator[Path]:
    for parent, children, files in os.walk(root):
        children[:] = [c for c in children if c not in _LEFT_OUT and not c.startswith(_OF_ONE_BUILD)]
        yield from (Path(parent) / f for f in files if f.endswith(".py") and not f.startswith(_OF_ONE_BUILD))
