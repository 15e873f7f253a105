"""The folder of a run: what it did, how it ended, and who is at work in it.

    config.yaml        the resolved configuration, written by whoever starts the run
    environment.json   what the last start ran on (that of every start is in events.jsonl)
    metrics.jsonl      one row for each logged step and evaluation: the source of truth of every plot
    events.jsonl       starts, saves, skips, faults: history, never cut
    status.json        running, stopped, done or failed; at which step; why
    log.txt            the lines people read
    checkpoints/  eval/  tensorboard/
    offending/         batches of steps that went wrong, see `lmtrain.offending`
    lock               who is at work, see `lmtrain.run.lock`

One process writes; the others of a run have a `RunFolder`. `read_metrics` and `read_status` need no lock.
"""

import json
import logging
import re
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from lmtrain.checkpoint import shelf
from lmtrain.files import TEMPORARY, replace_bytes
from lmtrain.run import environment
from lmtrain.run.lock import Lock
from lmtrain.run.rows import Row, RowFile, read_rows

logger = logging.getLogger(__name__)
_STARTING = re.compile(r"lock|status\.json\.tmp-[0-9a-f]{8}")  # what a start has made before its status.json
State = Literal["running", "stopped", "done", "failed"]


@dataclass(frozen=True)
class Status:
    """How a run stands: `step` updates were made, `checkpoint` is the newest, relative to the run's folder.

    A run that was killed still says `running`; `lmtrain.run.lock.Holder` tells whether anybody is at work.
    """

    state: State
    step: int = 0
    checkpoint: str | None = None
    reason: str = ""


def read_status(path: Path) -> Status | None:
    """The status of the run at `path`; None if it has none that can be read."""
    try:
        content = json.loads((Path(path) / "status.json").read_text())
        status = Status(**{key: content[key] for key in ("state", "step", "checkpoint", "reason")})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    intact = type(status.step) is int and isinstance(status.checkpoint, str | None) and isinstance(status.reason, str)
    return status if intact and status.state in get_args(State) else None


def read_metrics(path: Path) -> list[Row]:
    """The rows of `metrics.jsonl` of the run at `path`, which may be at work: a torn line is left out."""
    return read_rows(Path(path) / "metrics.jsonl")


class RunFolder:
    """A run's folder for a process that only reads it: what it is told to write, another one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status = Status("running")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def set_status(self, state: State, *, step: int, checkpoint: Path | str | None = None, reason: str = "") -> None:
        """See `RunDirectory`, as for all below."""

    def log_metrics(self, row: Row) -> None: ...
    def sync_metrics(self) -> None: ...
    def event(self, kind: str, **details: Any) -> None: ...
    def log(self, line: str) -> None: ...
    def truncate_metrics(self, step: int) -> int:
        return 0

    def fail(self, reason: str) -> None:
        """Write that the run failed: for the process that writes, which is gone; else `RunDirectory` does it."""
        status = replace(read_status(self.path) or self.status, state="failed", reason=reason)
        _write_json(self.path / "status.json", asdict(status) | {"time": _now()})
        with open(self.path / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"failed: {reason}\n")

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RunDirectory(RunFolder):
    """A run's folder, locked by this process from `open` to `close`."""

    def __init__(self, path: Path, lock: Lock) -> None:
        """`open` is the way in; `lock` is held already."""
        super().__init__(path)
        self._lock = lock
        self.status = replace(read_status(path) or Status("running"), state="running", reason="")
        self._write_status()  # before any other file: it marks the folder as a run's
        for folder in (self.checkpoints, self.evaluations, self.tensorboard):
            folder.mkdir(exist_ok=True)
        self._metrics = RowFile(path / "metrics.jsonl")
        self._events = RowFile(path / "events.jsonl")
        self._log = open(path / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """Creates the folder, or takes up the run that is in it, and says so in its status and events.

        ValueError, naming `run.dir`, if another process is at work there, if the folder holds something else
        than a run, or if it cannot be written.
        """
        path = Path(path).expanduser().absolute()
        try:
            if path.exists() and not path.is_dir():
                raise ValueError("it is a file")
            path.mkdir(parents=True, exist_ok=True)
            _refuse_strangers(path)
            lock = Lock(path / "lock")
            try:
                return cls(path, lock)._start()
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            raise ValueError(f"run.dir {path}: cannot be written: {error.strerror or error}") from error
        except ValueError as error:
            raise ValueError(f"run.dir {path}: {error}") from None

    def set_status(self, state: State, *, step: int, checkpoint: Path | str | None = None, reason: str = "") -> None:
        """Replaces the status, after making the rows so far durable; without `checkpoint` the last one stays.

        For the saves of a run and its end: it waits for the disk. A disk that refuses costs a warning, not
        the run.
        """
        assert state in get_args(State), state
        name = f"checkpoints/{Path(checkpoint).name}" if checkpoint else self.status.checkpoint
        self.status = Status(state, step, name, reason)
        if state != "running":
            self.event("end", state=state, step=step, reason=reason)
        for write in (self._metrics.sync, self._events.sync, self._write_status):
            try:
                write()
            except OSError as error:
                logger.warning("%s: the status %s was not written: %s", self.path, state, error)

    def log_metrics(self, row: Row) -> None:
        """Appends a row, which has a `step`, to `metrics.jsonl`; what is not finite is written as null."""
        assert isinstance(row.get("step"), int), row
        self._metrics.append(row)

    def sync_metrics(self) -> None:
        """Makes the rows so far durable, as they must be before a checkpoint is. OSError if the disk refuses them."""
        self._metrics.sync()

    def event(self, kind: str, **details: Any) -> None:
        """Appends a row to `events.jsonl`: time, kind and details."""
        self._events.append({"time": _now(), "event": kind, **details})

    def log(self, line: str) -> None:
        """Appends a line to `log.txt`."""
        try:
            self._log.write(f"{line}\n")
            self._log.flush()
        except OSError as error:
            logger.warning("%s: %s", self._log.name, error)

    def fail(self, reason: str) -> None:
        """Writes that the run failed, and why, into status and log."""
        self.log(f"failed: {reason}")
        self.set_status("failed", step=self.status.step, reason=reason)

    def truncate_metrics(self, step: int) -> int:
        """Cuts the rows beyond `step`, where training resumes, atomically; returns how many went."""
        return self._metrics.keep(lambda row: not isinstance(at := row.get("step"), int) or at <= step)

    def close(self) -> None:
        """Releases the lock. OSError if the disk never took the last rows."""
        with ExitStack() as stack:  # last in, first out, whatever the others raise
            stack.callback(self._lock.release)
            for file in (self._events, self._metrics):
                stack.callback(file.close)
            stack.callback(self._close_log)

    def _close_log(self) -> None:
        """Its last lines are no reason to call a run failed whose rows and checkpoints are there."""
        try:
            self._log.close()
        except OSError as error:
            logger.warning("%s: %s", self._log.name, error)

    def _start(self) -> "RunDirectory":
        for path in self.path.iterdir():
            if TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink()
        here = environment.describe()
        _write_json(self.path / "environment.json", here)
        self.event("start", environment=here)
        if self._lock.previous:
            self.event("took over", holder=str(self._lock.previous))
        if leftovers := shelf.clean(self.checkpoints):
            self.event("cleaned", removed=[path.name for path in leftovers])
        return self

    def _write_status(self) -> None:
        _write_json(self.path / "status.json", asdict(self.status) | {"time": _now()})


def _refuse_strangers(path: Path) -> None:
    """ValueError if the folder has content but no status: it is no run's. A start cut short left its lock."""
    names = {entry.name for entry in path.iterdir()}
    if "status.json" not in names and any(not _STARTING.fullmatch(name) for name in names):
        raise ValueError("the folder is not empty and holds no run; choose a new one")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    replace_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _now() -> str:
    """Local time with its offset, to the second: for people only, nothing depends on it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
