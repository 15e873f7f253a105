"""JSON lines: one object a line, appended and flushed, readable while they grow, repaired after a crash."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmtrain.files import replace_bytes

logger = logging.getLogger(__name__)
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All rows of the file at `path`, none if there is no file; a line torn by a crash is left out."""
    return [row for _, row in _rows(_content(path))]


class RowFile:
    """Appends rows to the file at `path`; torn lines found at the start are cut.

    A full disk does not end a training run: what could not be written waits in memory for the next append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.keep(lambda row: True)

    def keep(self, wanted: Callable[[Row], bool]) -> int:
        """Keeps only the wanted rows, atomically; returns how many went."""
        content = _content(self.path) + self._waiting
        rows = list(_rows(content))
        kept = b"".join(line + b"\n" for line, row in rows if wanted(row))
        if kept != content:
            replace_bytes(self.path, kept)
            os.close(self._descriptor)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._waiting = b""
        return sum(not wanted(row) for _, row in rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row. JSON has no NaN and no infinity: such a number is written as null."""
        self._waiting += (json.dumps(finite(row), allow_nan=False) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            logger.warning("%s waits to be written: %s", self.path, error)

    def sync(self) -> None:
        """Makes the rows so far durable; OSError if the disk refuses them."""
        self._flush()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """OSError if rows are still waiting for the disk."""
        try:
            self._flush()
        finally:
            os.close(self._descriptor)

    def _flush(self) -> None:
        while self._waiting:  # a disk that fills up may take a part of a line, and the rest later
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _rows(content: bytes) -> Iterator[tuple[bytes, Row]]:
    """Each line that holds a row, and the row."""
    for line in content.split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield line, row


def finite(value: Any) -> Any:
    """The same JSON value, with null for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
