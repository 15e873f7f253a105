"""The folder of a sweep, and how each of its runs stands.

sweep.json                 name and version: whose folder this is
NAME-HASH/                 a run; with result.json when it is done, failure.json when it was given up
logs/NAME-HASH.txt         what the run's processes said
lock                       the driver at work
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmtrain.checkpoint.shelf import candidates
from lmtrain.files import replace_bytes
from lmtrain.run import Status, read_status
from lmtrain.run.lock import Holder, Lock
from lmtrain.sweep.result import VERSION, RunFailure, RunResult
from lmtrain.sweep.runs import Run

State = Literal["done", "running", "failed", "queued"]
MARKER = "sweep.json"


def read_marker(folder: Path) -> tuple[Any, str] | None:
    """(version, name) as the folder's sweep.json says; None without one. ValueError if it cannot be read."""
    path = folder / MARKER
    try:
        content = json.loads(path.read_text())
        return content["version"], str(content["name"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable: {error}") from None


@dataclass(frozen=True)
class SweepFolder:
    """The folder of the sweep `name`, which may not exist yet."""

    path: Path
    name: str

    def check(self) -> None:
        """ValueError if the folder holds something else: another sweep, one of another version, no sweep at all."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"--out {self.path}: is a file; choose a folder")
        try:
            found = read_marker(self.path)
        except ValueError as error:
            raise ValueError(f"{error}; choose another --out") from None
        if found is None:
            if any(self.path.iterdir()):
                raise ValueError(f"--out {self.path}: the folder is not empty and holds no sweep; choose a new one")
            return
        version, name = found
        if version != VERSION:
            marker = self.path / MARKER
            raise ValueError(f"{marker}: of version {version}, this lmtrain reads {VERSION}; choose another --out")
        if name != self.name:
            raise ValueError(f"--out {self.path}: holds the sweep {name}, not {self.name}; choose another folder")

    def open(self) -> Lock:
        """Make the folder, or take up the sweep in it; the lock of its driver, which is held from now on."""
        self.check()
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            content = json.dumps({"version": VERSION, "name": self.name}, indent=1) + "\n"
            replace_bytes(self.path / MARKER, content.encode())
            return Lock(self.path / "lock")
        except OSError as error:
            raise ValueError(f"--out {self.path}: cannot be written: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"--out {self.path}: {error}") from None

    def of(self, run: Run) -> Path:
        """The run's own folder."""
        return self.path / run.folder

    def log(self, run: Run) -> Path:
        """The file of what its processes said."""
        return self.path / "logs" / f"{run.folder}.txt"

    def result(self, run: Run) -> RunResult | None:
        """Its result, if there is one. ValueError if it cannot be read, or is that of another run."""
        found = RunResult.read(self.of(run))
        if found is not None and found.hash != run.hash:
            raise ValueError(f"{self.of(run)}: holds the result of {found.hash}; choose another --out")
        return found

    def failure(self, run: Run) -> RunFailure | None:
        """Why it was given up, if it was."""
        return RunFailure.read(self.of(run))

    def is_trained(self, run: Run) -> bool:
        """Whether its last step has been taken."""
        status = self.status(run)
        return status is not None and status.state == "done" and status.step >= run.config.train.steps

    def is_done(self, run: Run) -> bool:
        """Whether nothing is left to do: the trunk of forks is not evaluated."""
        return self.is_trained(run) and (run.is_trunk or self.result(run) is not None)

    def is_at_work(self, run: Run) -> bool:
        """Whether some process has the run's lock."""
        holder = Holder.read(self.of(run) / "lock")
        return holder is not None and holder.alive()

    def status(self, run: Run) -> Status | None:
        """What the run says of itself."""
        return read_status(self.of(run))

    def has_begun(self, run: Run) -> bool:
        """Whether it has a checkpoint of its own, with which it goes on."""
        return bool(candidates(self.of(run) / "checkpoints"))

    def fork(self, run: Run) -> list[str]:
        """The words that make a run begin with its parent's last checkpoint."""
        if run.parent is None:
            return []
        return ["--resume", str(self.of(run.parent) / "checkpoints" / f"step-{run.begins}")]

    def state(self, run: Run) -> State:
        """How the run stands."""
        if self.is_done(run):
            return "done"
        if self.is_at_work(run):
            return "running"
        return "failed" if self.failure(run) is not None else "queued"
