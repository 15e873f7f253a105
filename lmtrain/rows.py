"""JSON lines: one object a line, appended and flushed, readable while they grow, repaired after a crash."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmtrain.files import replace_bytes

logger = logging.getLogger(__name__)
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All rows of the file at `path`, [] if there is none. A line that was torn by a crash, or is just being
    written, is left out.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [row for line in lines if (row := _parse(line)) is not None]


class RowFile:
    """Appends rows to the file at `path`; torn lines found at the start are cut.

    A disk that is full does not end a training run: what could not be written waits in memory for the next
    append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._descriptor = -1
        self.keep(lambda row: True)

    def keep(self, wanted: Callable[[Row], bool]) -> int:
        """Keeps only the wanted rows, atomically; returns how many went."""
        rows = read_rows(self.path)
        kept = [row for row in rows if wanted(row)]
        content = b"".join(_line(row) for row in kept)
        if not self.path.exists() or self.path.read_bytes() != content:
            replace_bytes(self.path, content)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        return len(rows) - len(kept)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row. JSON has no NaN and no infinity: such a number is written as null."""
        self._waiting += _line(row)
        try:
            while self._waiting:  # a disk that fills up may take a part of a line, and the rest later
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            logger.warning("%s waits to be written: %s", self.path, error)

    def sync(self) -> None:
        """Makes the rows so far durable."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """OSError if rows are still waiting for the disk."""
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        finally:
            os.close(self._descriptor)


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(_finite(row), allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
