"""Saving a run's checkpoints: one at a time, in a thread if asked, so that training need not wait for the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lmtrain import checkpoint
from lmtrain.run import RunFolder
from parallel.world import World


@dataclass(frozen=True)
class _Ended:
    """A save that has ended: the checkpoint, if it is complete, the seconds it took to write, and what went wrong in
    writing or in tidying up."""

    step: int
    path: Path | None
    seconds: float
    error: Exception | None = None


class Saver:
    """Writes the checkpoints of a run. All ranks call every method; the first one writes.

    background: write in a thread, from a copy of the tensors in CPU memory; then a later call says how it went.
    A disk that refuses costs a warning, not the run: the next checkpoint is tried at its time. saved_step: that of the
    newest checkpoint known to be complete, -1 before. seconds: that it took to write, 0 before.
    """

    def __init__(
        self, run: RunFolder, world: World, *, keep: int, background: bool, complain: Callable[[str], None]
    ) -> None:
        self.run, self.world = run, world
        self.keep, self.background, self.complain = keep, background, complain
        self.saved_step = -1
        self.seconds = 0.0
        self._verified = checkpoint.Verified()
        self._thread: threading.Thread | None = None
        self._ended: _Ended | None = None

    def save(
        self, step: int, tensors: checkpoint.Groups, state: Mapping[str, Any], *, config: str, dataset: str
    ) -> None:
        """Write `step-N`, when the save before has ended. The tensors may change as soon as this returns.

        Not while rows wait for the disk: killed behind the checkpoint, the run would go on without them.
        """
        if not self.world.is_first:
            return
        self.settle()
        try:
            self.run.sync_metrics()
        except OSError as error:
            self._ended = _Ended(step, None, 0.0, self._refused(step, tensors, error))
            return self.settle()
        made_from = {"config": config, "dataset": dataset}
        if self.background:
            work = (step, checkpoint.copied(tensors), state, made_from)
            self._thread = threading.Thread(target=self._write, args=work, name="save", daemon=True)
            self._thread.start()
        else:
            self._write(step, tensors, state, made_from)
            self.report()

    def report(self) -> None:
        """Say how the save in flight went, if it has ended."""
        if self._thread is None or not self._thread.is_alive():
            self.settle()

    def settle(self) -> None:
        """Wait for the save in flight, and say how it went. What the disk is not to blame for is raised."""
        if self._thread is not None:
            self._thread.join()
        ended, self._thread, self._ended = self._ended, None, None
        if ended is None:
            return
        if ended.path is not None:
            self.saved_step, self.seconds = ended.step, ended.seconds
            self.run.event("save", step=ended.step, path=ended.path.name)
            self.run.set_status("running", step=ended.step, checkpoint=ended.path)
        if isinstance(ended.error, checkpoint.CheckpointError):
            self.run.event("save failed", step=ended.step, reason=str(ended.error))
            self.complain(f"no checkpoint at step {ended.step}: {ended.error}")
        elif isinstance(ended.error, OSError):
            self.complain(f"old checkpoints could not be removed: {ended.error}")
        elif ended.error is not None:
            raise ended.error

    def has_saved(self, step: int) -> bool:
        """Whether the newest checkpoint is that of `step`, once no save is in flight; the same answer on all ranks."""
        self.settle()
        return self.world.largest(self.saved_step) == step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # who interrupts does not wait
            self.settle()

    def _refused(self, step: int, tensors: checkpoint.Groups, error: OSError) -> checkpoint.CheckpointError:
        reason = f"the rows before it are not on the disk: {error.strerror}"
        return checkpoint.CheckpointError(
            self.run.checkpoints / f"step-{step}", checkpoint.bytes_needed(tensors), reason
        )

    def _write(
        self, step: int, tensors: checkpoint.Groups, state: Mapping[str, Any], made_from: Mapping[str, str]
    ) -> None:
        path, began = None, time.perf_counter()
        try:
            path = checkpoint.save(self.run.checkpoints, step, tensors, state, world=self.world.size, **made_from)
            self._verified.add(path)
            checkpoint.retain(self.run.checkpoints, self.keep, verified=self._verified)
            self._ended = _Ended(step, path, time.perf_counter() - began)
        except Exception as error:
            self._ended = _Ended(step, path, time.perf_counter() - began, error)
