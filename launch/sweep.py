"""The driver of a sweep: it starts the processes of its runs, a few at a time, and survives whatever becomes of them.

Each run is `lmtrain train` in a folder of its own, then `lmtrain eval`, in processes that get SIGTERM when the driver
dies. So a killed driver costs the steps in flight, and a new one goes on from the checkpoints.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from attention.divisors import largest_divisor
from data.mixture import MIXTURE
from lmtrain.config import ConfigError, Problem
from lmtrain.config.rules import broken_rules
from lmtrain.setup import check_data, check_device
from lmtrain.signals import StopRequest
from lmtrain.sweep.collect import collect
from lmtrain.sweep.folder import SweepFolder
from lmtrain.sweep.plan import Plan
from lmtrain.sweep.result import RunFailure, RunResult
from lmtrain.sweep.runs import Run

Launcher = Literal["local", "torchrun", "deepspeed"]
SOME_FAILED, STOPPED, WRONG, GAVE_UP = 3, 75, 2, 4
"""Exit codes of a sweep, and of a run that will not do better a second time."""

LMTRAIN = ["-m", "lmtrain"]
"""What Python is told to run."""

PAUSE = 0.1
SECONDS_TO_SAVE = 120.0
"""After SIGTERM, before a run is killed."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "MemoryError", "Cannot allocate memory")
PR_SET_PDEATHSIG = 1  # prctl(2)
LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Options:
    """How runs are started. threads: of each process; timeout: seconds that training or evaluating a run may take;
    processes: of each run, with a launcher that starts several."""

    workers: int = 1
    threads: int = 1
    retries: int = 1
    timeout: float | None = None
    launcher: Launcher = "local"
    processes: int = 1


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-N: by signal N), whether it was at its time limit, what it said at last."""

    code: int
    timed_out: bool
    said: str

    @property
    def out_of_memory(self) -> bool:
        """As it says, or as the system's killer leaves it."""
        return self.code == -signal.SIGKILL or any(words in self.said for words in OUT_OF_MEMORY)

    @property
    def reason(self) -> str:
        """In words."""
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        how = f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        return f"{how}: {lines[-1][:300]}" if lines else how


Work = Generator["Start", Ended, None]
"""What is to be done for a run: it yields processes to be started, and is told how each of them ended."""


@dataclass(frozen=True)
class Start:
    """A process to be started. out: the file for its stdout, else it goes to the log."""

    command: list[str]
    out: Path | None = None


@dataclass
class Worker:
    """A run at work, and its process of the moment."""

    run: Run
    work: Work
    process: subprocess.Popen[bytes]
    began: float
    log_from: int
    asked_to_stop: float | None = None
    timed_out: bool = False


@dataclass
class Driver:
    """Runs a plan in a folder. say: told what happens."""

    plan: Plan
    folder: SweepFolder
    options: Options
    say: Callable[[str], None]
    failed: list[RunFailure] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    stopping: bool = False

    def go(self) -> int:
        """Run all that is not done; returns the exit code. ValueError if the folder is another sweep's or in use."""
        lock = self.folder.open()
        try:
            with StopRequest() as stop:
                return self._drive(stop)
        finally:
            for worker in self.workers:  # only if something went wrong here
                worker.process.terminate()
            lock.release()

    def _drive(self, stop: StopRequest) -> int:
        waiting = [run for run in self.plan.runs if not self.folder.is_done(run)]
        for run in waiting:
            if self.folder.is_at_work(run):
                self.say(f"{run.name}: another process is at work on it; waiting until that ends")
        self.say(f"{self.plan.spec.name}: {len(self.plan.runs) - len(waiting)} runs done, {len(waiting)} to do")
        while waiting or self.workers:
            if stop.asked() and not self.stopping:
                self.stopping = True
                self.say(f"stopping {len(self.workers)} runs, which save")
                for worker in self.workers:
                    self._ask_to_stop(worker)
            self.workers = [worker for worker in self.workers if self._is_at_work(worker)]
            if self.stopping and not self.workers:
                break
            waiting = self._start_some(waiting)
            time.sleep(PAUSE)
        return self._end()

    def _end(self) -> int:
        for failure in self.failed:
            self.say(f"failed: {failure.name} after {failure.attempts} attempts: {failure.reason} ({failure.log})")
        if self.stopping:
            self.say("stopped; the same command goes on from here")
            return STOPPED
        self.say(f"done: {len(self.plan.runs) - len(self.failed)} of {len(self.plan.runs)} runs")
        return SOME_FAILED if self.failed else 0

    def _start_some(self, waiting: list[Run]) -> list[Run]:
        """Start runs while there are workers for them; returns those that still wait."""
        later: list[Run] = []
        for run in waiting:
            if run.parent is not None and any(failure.hash == run.parent.hash for failure in self.failed):
                self._fail(run, 0, f"its parent {run.parent.name} failed", None)
            elif self.stopping or len(self.workers) >= self.options.workers or not self._is_ready(run):
                later.append(run)
            else:
                self._begin(run)
        return later

    def _is_ready(self, run: Run) -> bool:
        """Whether its parent is trained, and nobody else is at work on it, as a worker of a driver that was killed."""
        return (run.parent is None or self.folder.is_trained(run.parent)) and not self.folder.is_at_work(run)

    def _begin(self, run: Run) -> None:
        (self.folder.of(run) / RunFailure.FILE).unlink(missing_ok=True)
        work = self._work(run)
        start = next(work, None)
        if start is not None:
            self.workers.append(self._started(run, work, start))

    def _started(self, run: Run, work: Work, start: Start) -> Worker:
        log = self.folder.log(run)
        with open(log, "ab") as said, open(start.out or os.devnull, "wb") as out:
            said.write(f"$ {shlex.join(start.command)}\n".encode())
            said.flush()
            process = subprocess.Popen(
                start.command,
                stdin=subprocess.DEVNULL,
                stdout=out if start.out else said,
                stderr=said,
                env=environment(self.options.threads),
                start_new_session=True,  # Ctrl-C is the driver's, which asks its workers once
                preexec_fn=die_with_parent if LIBRARY is not None else None,
            )
        return Worker(run, work, process, time.monotonic(), log.stat().st_size)

    def _is_at_work(self, worker: Worker) -> bool:
        """Whether the worker has something left to do; starts its next process when the last one ended."""
        code = worker.process.poll()
        if code is None:
            self._watch_time(worker)
            return True
        with open(self.folder.log(worker.run), "rb") as log:
            log.seek(worker.log_from)
            said = log.read()[-20000:].decode(errors="replace")
        try:
            start = worker.work.send(Ended(code, worker.timed_out, said))
        except StopIteration:
            return False
        if self.stopping:
            return False
        replaced = self._started(worker.run, worker.work, start)
        worker.process, worker.began, worker.log_from = replaced.process, replaced.began, replaced.log_from
        worker.asked_to_stop, worker.timed_out = None, False
        return True

    def _watch_time(self, worker: Worker) -> None:
        now, limit = time.monotonic(), self.options.timeout
        if worker.asked_to_stop is None and limit is not None and now - worker.began > limit:
            worker.timed_out = True
            self._ask_to_stop(worker)
        elif worker.asked_to_stop is not None and now - worker.asked_to_stop > SECONDS_TO_SAVE:
            worker.process.kill()

    def _ask_to_stop(self, worker: Worker) -> None:
        worker.asked_to_stop = worker.asked_to_stop or time.monotonic()
        worker.process.terminate()

    def _work(self, run: Run) -> Work:
        """Train, with as many attempts as are allowed, then evaluate and write the result."""
        attempts = retried = 0
        micro_batch: int | None = None
        trained = self.folder.is_trained(run)
        while not trained:
            attempts += 1
            ended = yield Start(self._train_command(run, micro_batch))
            trained = ended.code == 0
            if trained:
                break
            if self.stopping:
                return
            smaller = _smaller(run, micro_batch, self.options.processes)
            if ended.timed_out:
                return self._fail(run, attempts, f"not trained within {self.options.timeout:g} seconds", None)
            if ended.out_of_memory and smaller is not None:
                micro_batch = smaller
                self.say(f"{run.name}: out of memory; again with train.micro_batch={smaller}, the same batch")
                continue
            retried += 1
            if ended.code in (WRONG, GAVE_UP) or retried > self.options.retries:
                return self._fail(run, attempts, ended.reason, ended.code)
            self.say(f"{run.name}: {ended.reason}; again")
        if run.is_trunk:
            self.say(f"{run.name}: trained")
            return
        scores = self.folder.path / "logs" / f"{run.folder}.eval.json"
        on = [] if self.plan.spec.evaluate is None else ["--on", self.plan.spec.evaluate]
        ended = yield Start([sys.executable, *LMTRAIN, "eval", str(self.folder.of(run)), *on, "--json"], scores)
        if self.stopping and ended.code:
            return
        if ended.timed_out:
            return self._fail(run, attempts, f"not evaluated within {self.options.timeout:g} seconds", None)
        if ended.code:
            return self._fail(run, attempts, f"evaluation: {ended.reason}", ended.code)
        self._keep(run, attempts, scores)

    def _keep(self, run: Run, attempts: int, scores: Path) -> None:
        """Write result.json, from what the evaluation printed."""
        try:
            evaluation = json.loads(scores.read_text())
            command = ["lmtrain", "train", *self._words(run), *self.folder.fork(run)]
            result = collect(run, self.plan.spec, self.folder.of(run), evaluation, shlex.join(command))
        except ValueError as error:
            return self._fail(run, attempts, f"evaluation: {error}", None)
        result.write(self.folder.of(run))
        left = sum(not self.folder.is_done(other) for other in self.plan.runs)
        self.say(f"{run.name}: {in_words(result)}; {left} runs left")

    def _train_command(self, run: Run, micro_batch: int | None) -> list[str]:
        smaller = [] if micro_batch is None else [f"train.micro_batch={micro_batch}"]
        fork = [] if self.folder.has_begun(run) else self.folder.fork(run)
        return launched(self.options, ["train", *self._words(run), *smaller, *fork])

    def _words(self, run: Run) -> list[str]:
        return [self.plan.spec.base, *run.words, f"run.dir={self.folder.of(run)}"]

    def _fail(self, run: Run, attempts: int, reason: str, code: int | None) -> None:
        folder, log = self.folder.of(run), self.folder.log(run)
        folder.mkdir(parents=True, exist_ok=True)
        failure = RunFailure(run.name, run.hash, dict(run.axes), attempts, reason, code, str(log))
        failure.write(folder)
        self.failed.append(failure)
        self.say(f"{run.name}: given up: {reason}")


def check_before(plan: Plan, processes: int = 1) -> None:
    """Whatever would stop runs at once: the text is read (and prepared for all of them), the device is asked.

    ConfigError with every problem.
    """
    problems: dict[Problem, None] = {}
    seen: set[str] = set()
    for run in plan.runs:
        for problem in broken_rules(run.config, processes, set()):
            problems[replace(problem, where=run.name)] = None
        if run.config.data.corpus == MIXTURE and plan.spec.evaluate is None:
            message = "which text of a mixture is to be scored? write evaluate: NAME, as of lmtrain eval --on"
            problems[Problem(plan.spec.name, "evaluate", message)] = None
        what = repr((run.config.data, run.config.model.vocab_size, run.config.train.dtype))
        if what not in seen:
            seen.add(what)
            for problem in (*check_data(run.config), *check_device(run.config)):
                problems[replace(problem, where=plan.spec.name)] = None
    if problems:
        raise ConfigError(problems)


def launched(options: Options, words: Sequence[str]) -> list[str]:
    """The command that starts `lmtrain` with these words under the launcher."""
    if options.launcher == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
        return [*launcher, f"--nproc-per-node={options.processes}", "-m", "lmtrain", *words]
    if options.launcher == "deepspeed":
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={options.processes}"]
        return [*launcher, "--module", "lmtrain", *words]
    return [sys.executable, *LMTRAIN, *words]


def environment(threads: int) -> dict[str, str]:
    """Of a worker: its threads, and no folder of the user's before our packages."""
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**os.environ, **pinned, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def die_with_parent() -> None:
    """In a child, before its program begins: get SIGTERM when the driver ends, however that happens."""
    assert LIBRARY is not None
    LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def in_words(result: RunResult) -> str:
    """Loss and pace on one line."""
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    return f"loss {result.loss:.4f}{bits}, {result.tokens_per_second:,.0f} tokens/s"


def _smaller(run: Run, micro_batch: int | None, processes: int) -> int | None:
    """Half the micro-batch, or the next divisor below of each process's sequences; None if it is 1 already."""
    ranks = max(1, processes // run.config.parallel.sequence)
    now = run.config.micro_batch(ranks) if micro_batch is None else micro_batch
    return None if now == 1 else largest_divisor(run.config.batch_sequences // ranks, now // 2)
