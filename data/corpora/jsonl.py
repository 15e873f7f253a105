"""Lines of JSON: one column of them is the text, each line a document."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.compressed import reading
from data.corpora.contract import Corpus, Source
from data.corpora.table import text_of
from data.document import file_identity
from data.files import find_files
from data.holdout import hold_out, repeated
from data.kept import KeptPart, Texts, keep

MOST_LINE_BYTES = 1 << 28


def jsonl(source: Source) -> Corpus:
    """A file, folder or pattern of .jsonl files, compressed or not, in order of path.

    A title is the file and the number of the line. Empty texts are left out, blank lines are none.
    """
    if source.path is None:
        raise ValueError("data.path: the corpus `jsonl` needs the path of a file or folder, or a pattern")
    text = _kept(source.path, "data.path", source)
    splits = hold_out(text.documents, source.validation, lambda path: _kept(path, "data.validation", source).documents)
    empty = [f"{text.empty} lines without text were left out"] if text.empty else []
    return Corpus("jsonl", splits, notes=(*empty, *repeated(splits)))


def _kept(path: str, key: str, source: Source) -> KeptPart:
    files = find_files(path, key)
    identity = [source.column, *map(file_identity, files)]
    text = keep("jsonl", identity, lambda: _read(files, source.column), source.cache).get("all")
    if text is None or not text.documents:
        raise ValueError(f"{key}: {path} holds no text")
    return text


def _read(files: list[Path], column: str) -> Texts:
    folder = os.path.commonpath([file.parent for file in files])
    for file in files:
        for number, line in _lines(file):
            where = f"{file}, line {number}"
            yield "all", f"{file.relative_to(folder).as_posix()}:{number}", text_of(_row(line, where), column, where)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of those that are not blank."""
    number = 0
    with reading(path) as file:
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {MOST_LINE_BYTES:,} bytes")
            if line.strip():
                yield number, line


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at its byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object with the text in a column, not {type(row).__name__}")
    return row
