"""A file of curves as TensorBoard reads them, whose name says which one it is in the order of those of a run.

TensorBoard reads the files of a folder by name, each once, and a run that resumes takes back what the files before say
of later steps (`purge`): in another order curves would double back. The name begins with the second of the clock: two
files of one second would be ordered by chance, and those of a clock that jumped back the wrong way round. So ours is
always behind the newest that is there, with a second of the future if need be.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\..*")


class EventFile:
    """A new file in `folder`, which has one writer at a time. OSError if the disk refuses."""

    def __init__(self, folder: Path, purge: int) -> None:
        """purge: the step from which on earlier files do not count any more."""
        folder.mkdir(parents=True, exist_ok=True)
        known = [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        second = max([int(time.time()), *(newest + 1 for newest in known)])
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(open(folder / name, "xb"))  # noqa: SIM115 - closed by close()
        self._append(file_version="brain.Event:2")
        self._append(step=purge, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A point of each curve."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._append(step=step, summary=Summary(value=points))

    def close(self) -> None:
        """Nothing is waiting."""
        self._records.close()

    def _append(self, **fields: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()
