"""The run of a soak: lives of one process each, and what must hold in and between them (see benchmarks/soak.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from launch.cli import INTERRUPTED, STOPPED
from lmtrain import checkpoint
from lmtrain.checkpoint.shelf import step_of
from lmtrain.run import read_metrics, read_status

SETTINGS = [
    *["train.steps=1000000", "train.batch_tokens=128", "train.threads=1", "data.seq_len=64", "checkpoint.every=5"],
    *["optimizer.schedule=constant", "optimizer.warmup=0", "model.dim=32", "model.layers=2", "model.dropout=0.1"],
    *["log.every=1", "log.tensorboard=false", "eval.every=100", "eval.tokens=4096"],
    "model.pattern=near far",
]
PATIENCE = 600.0  # seconds for a life to do what it should, on the slowest and busiest machine


class SoakError(Exception):
    """What a soak is there to find."""


class Soak:
    """The run under test, in lives of one process each.

    folder: with the run, the tokens and what the lives print. stop_seconds: the longest time from a request to stop
    to the end of the process.
    """

    def __init__(self, folder: Path, rng: Random) -> None:
        self.folder, self.rng = folder, rng
        self.run = folder / "run"
        self.starts = 0
        self.newest = -1
        self.stop_seconds = 0.0
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *overrides: str, fault: str = "") -> subprocess.Popen[bytes]:
        """A life: the same command as ever, with a hash seed of its own and saves in a thread or not."""
        self.starts += 1
        self._begun_before = self._begun()
        asynchronous = f"checkpoint.asynchronous={self.rng.choice(('true', 'false'))}"
        return self.launch(self.run, asynchronous, *overrides, fault=fault)

    def start_and_wait(self) -> subprocess.Popen[bytes]:
        """A life that has come to a random moment."""
        process = self.start()
        if self.rng.random() >= 0.3:
            self.wait_for_steps(process)
        self.sleep(process, self.rng.uniform(0.0, 6.0))
        return process

    def launch(self, run: Path, *overrides: str, fault: str = "") -> subprocess.Popen[bytes]:
        """`lmtrain train` in a process of its own; what it prints is appended to output.txt."""
        words = [f"run.dir={run}", f"data.cache={self.folder}/cache", *SETTINGS, *overrides]
        with open(self.folder / "output.txt", "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "lmtrain", "train", "demo", *words],
                env={**os.environ, "LMTRAIN_FAULT": fault, "PYTHONHASHSEED": str(self.rng.randrange(1000))},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        return process

    def has_begun(self) -> bool:
        """Whether the newest life has opened the folder of the run: from then on it saves where it is asked to stop."""
        return self._begun() > self._begun_before

    def wait_for_steps(self, process: subprocess.Popen[bytes]) -> None:
        """Until it trains."""
        before, deadline = None, time.monotonic() + PATIENCE
        while process.poll() is None:
            if self.has_begun():
                size = (self.run / "metrics.jsonl").stat().st_size
                if before is not None and size > before:
                    return
                before = size
            if time.monotonic() > deadline:
                raise SoakError(f"no step within {PATIENCE} seconds")
            time.sleep(0.02)

    def expect(self, process: subprocess.Popen[bytes], *codes: int) -> None:
        """The end of a life, with one of these exit codes."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise SoakError(f"it did not end within {PATIENCE} seconds") from None
        if code not in codes:
            raise SoakError(f"exit code {code}, expected {' or '.join(map(str, codes))}")

    def ask(self, process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """Asks the life to stop: it saves where it is, or ends at once if it has not begun yet."""
        asked = time.monotonic()
        process.send_signal(number)
        at_once = (-number, INTERRUPTED) if number == signal.SIGINT else (-number,)
        process.wait(PATIENCE)
        self.stop_seconds = max(self.stop_seconds, time.monotonic() - asked)
        self.expect(process, *((STOPPED,) if self.has_begun() else at_once))
        if self.has_begun():
            self.expect_saved()

    def expect_saved(self) -> None:
        """The run has stopped with a checkpoint of the last step it made."""
        status, (newest, _) = read_status(self.run), checkpoint.newest(self.run / "checkpoints")
        steps = [row["step"] for row in read_metrics(self.run)]
        step = steps[-1] if steps else 0
        if (
            newest is None
            or status is None
            or (status.state, status.step, newest.name) != ("stopped", step, f"step-{step}")
        ):
            raise SoakError(f"stopped at step {step}, but the status is {status}, the newest checkpoint {newest}")

    def check(self) -> None:
        """What must hold between two lives."""
        steps = [row["step"] for row in read_metrics(self.run) if "split" not in row]
        if steps != list(range(1, len(steps) + 1)):
            raise SoakError("the rows do not count 1, 2, 3, ...")
        newest, _ = checkpoint.newest(self.run / "checkpoints")
        step = -1 if newest is None else step_of(newest)
        if step < self.newest:
            raise SoakError(f"the newest checkpoint is of step {step}; it was of step {self.newest}")
        if step > len(steps):
            raise SoakError(f"there is a checkpoint of step {step}, but the rows end at {len(steps)}")
        self.newest = step

    def close(self) -> None:
        """Ends what still lives."""
        for process in self.processes:
            process.kill()
            process.wait()

    def _begun(self) -> int:
        path = self.run / "events.jsonl"
        return path.read_bytes().count(b'"event": "start"') if path.exists() else 0

    def sleep(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
