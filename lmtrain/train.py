"""Training: steps, evaluations and checkpoints in their order, so that a killed run resumes to the same weights.

At a step boundary the order is: row, evaluation, checkpoint. So whatever is older than a checkpoint is on the disk
when it is, and what is newer is cut from metrics.jsonl when the run resumes from it.

Several ranks do all of it together, each with rows of its own; the first one writes and prints.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attention import native
from data.loader import Batch, Batches
from data.shards import TokenDataset
from data.tasks import TaskDataset
from lmtrain import checkpoint, exhausted
from lmtrain import config as configuration
from lmtrain.board import Board
from lmtrain.config import Config
from lmtrain.counters import Counters
from lmtrain.deadline import Deadline, seconds_of
from lmtrain.evaluation.evaluate import EvaluationStopped
from lmtrain.evaluation.validation import Report, validate
from lmtrain.guard import Guard
from lmtrain.hardware import peak_memory, pick_device
from lmtrain.offending import Offending
from lmtrain.progress import Nowhere, Progress
from lmtrain.resume import check_state, choose, refuse_others
from lmtrain.run import RunDirectory, RunFolder, read_metrics
from lmtrain.run_log import RunLog
from lmtrain.saving import Saver
from lmtrain.schedule import learning_rate
from lmtrain.setup import (
    FREE_TO_CHANGE,
    Data,
    build_data,
    build_engine,
    build_model,
    make_loader,
    run_folder,
    with_vocabulary,
)
from lmtrain.signals import StopRequest
from lmtrain.spikes import Spikes
from lmtrain.step import Stepper
from parallel.agree import AgreedError, by_first, first_before_others, together
from parallel.engine import StepInfo
from parallel.watchdog import Watchdog
from parallel.world import ALONE, World

DONE, GAVE_UP, STOPPED = 0, 4, 75
"""Exit codes of a training run; a last checkpoint that could not be written is a crash, 1."""


def train(
    config: Config,
    *,
    resume: Path | None = None,
    fresh: bool = False,
    debug: bool = False,
    world: World = ALONE,
    watchdog: Watchdog | None = None,
) -> int:
    """Train as `config` says, from the newest checkpoint of run.dir, from `resume`, or from the beginning.

    resume: a checkpoint to start a new run from (a fork), or the newest one of run.dir itself. fresh: if run.dir
    holds damaged checkpoints only, begin again beside them. debug: FloatingPointError where a forward pass makes a
    number that is not finite, instead of a skipped update. world: the ranks that train together, all of which call
    this; watchdog: of this rank (without, the first one alone writes how it failed). Returns the exit code, the same on
    all; ValueError is the user's.
    """
    watchdog = watchdog or Watchdog(ALONE, config.parallel.timeout)
    limit = config.train.max_time
    deadline = Deadline(None if limit is None else seconds_of(limit))
    with StopRequest(world, deadline) as stop, open_folder(config, world) as run:
        if world.is_first or watchdog.world is world:
            watchdog.on_failure = run.fail
        try:
            return Training(config, run, stop, debug, world, watchdog.at).go(resume, fresh)
        except AgreedError as error:
            if world.is_first:
                run.fail(str(error))
            raise
        except BaseException as error:
            reason = watchdog.fail(f"{type(error).__name__}: {error}")
            if world.size > 1:
                print(f"rank {world.rank} ends: {reason}", file=sys.stderr, flush=True)
            raise


def open_folder(config: Config, world: World) -> RunFolder:
    """The run's folder, which the first rank writes."""
    folder = run_folder(config)
    return together(world, lambda: RunDirectory.open(folder) if world.is_first else RunFolder(folder.absolute()))


class Training:
    """One rank's work on a run: the parts, the counters, and what happens at each step boundary."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        stop: StopRequest,
        debug: bool = False,
        world: World = ALONE,
        at: Callable[[str], None] = lambda place: None,
    ) -> None:
        """at: told how far this rank has come, before whatever may take long."""
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.run = run
        self.stop = stop
        self.world = world
        self.at = at
        self.progress = Progress(None if world.is_first else Nowhere(), keep=run.log)
        self.device = pick_device()
        missing = native.why_not("attend") if self.device.type == "cpu" else None
        if missing:
            self._complain(f"{missing}; attention takes up to three times as long without")
        self.data: Data = first_before_others(world, lambda: build_data(config))
        self.config = config = with_vocabulary(config, self.data.tokenizer)
        self.model = build_model(config, self.device)
        self.log = RunLog(config, self.model, self.data, self.device, world, run, self.progress)
        stop.deadline.expect_save(12 * self.log.parameters)
        self.engine = build_engine(config, self.model, self.device, world)
        self.stepper = Stepper(config, self.model, self.engine, self.device, world, debug=debug, at=at)
        self.counters = Counters()
        offending = Offending(run.path, self.data.tokenizer, world, self._complain)
        self.guard = Guard(config, run, world, self.counters, offending, self._complain)
        self.loader = self._make_loader()
        background = config.checkpoint.asynchronous
        background = self.device.type == "cuda" if background is None else background
        self.saver = Saver(run, world, keep=config.checkpoint.keep, background=background, complain=self._complain)
        self.parent: str | None = None
        self.scored = len(self.data.validation)  # at this step; fewer where the run was stopped in its evaluation
        self.board = Board(run.tensorboard, self._complain, enabled=False)

    def go(self, resume: Path | None, fresh: bool) -> int:
        """Resume or begin, train, and say how it ended."""
        with closing(self.engine):
            try:
                return self._go(resume, fresh)
            except (MemoryError, RuntimeError) as error:
                if not exhausted.is_exhausted(error):
                    raise
                raise MemoryError(exhausted.in_words(self.config, self.world)) from error

    def _go(self, resume: Path | None, fresh: bool) -> int:
        start = self._restore(resume, fresh)
        counters = self.counters
        if self.world.is_first and not (self.run.path / "config.yaml").exists():
            configuration.save(self.config, self.run.path / "config.yaml")
        if counters.step >= self.config.train.steps and self.scored >= len(self.data.validation):
            return self._already_done()
        self.log.introduce(start)
        code = None
        try:
            with self.saver:
                while code is None:
                    wanted = self.config.log.tensorboard and self.world.is_first
                    self.board = Board(self.run.tensorboard, self._complain, wanted, purge_step=counters.step + 1)
                    with closing(self.board):
                        code = self._train()
        finally:
            self.run.event("memory", step=counters.step, peak_memory=peak_memory(self.device))
        return code

    def _train(self) -> int | None:
        """From here to the end, and the exit code; or up to a roll-back, and None: then again from there."""
        try:
            self._evaluate(self.data.validation[self.scored :])
        except EvaluationStopped:
            return self._stopped()
        self.scored = len(self.data.validation)
        self.loader = self._make_loader()  # a checkpoint or a roll-back may have said what is left out
        with closing(self.loader.batches(self.counters.samples)) as steps:
            while self.counters.step < self.config.train.steps:
                self.saver.report()
                if self.stop.asked():
                    return self._stopped()
                self.at(f"step {self.counters.step + 1}, its batches")
                began = time.perf_counter()
                info = self._one_step(next(steps))
                self.stop.deadline.took_step(time.perf_counter() - began)
                if trouble := self.guard.trouble(info):
                    self.saver.settle()
                    if self.guard.roll_back(trouble.reason, self._load_own):
                        return None
                    if trouble.final:
                        return self._give_up(trouble.reason)
                try:
                    self._after_step()
                except EvaluationStopped:
                    return self._stopped()
        return self._finish()

    def _make_loader(self) -> Batches:
        return make_loader(self.config, self.data.train, self.world, self.counters.unread)

    def _one_step(self, batches: list[Batch]) -> StepInfo:
        """One step: made, counted and told."""
        number, first_sample = self.counters.step + 1, self.counters.samples
        lr = learning_rate(number - 1, self.config.train.steps, self.config.optimizer)
        with self.log.seconds:
            update = partial(self.guard.update, self.engine, lr)
            step = self.stepper.make(number, batches, update, watched=self.log.has_row(number))
        self.counters.count(self.loader.after(first_sample), self.config.train.batch_tokens, step.info.skipped)
        self.guard.tell(step, first_sample)
        self.log.tell(step, self.counters, self.board)
        return step.info

    def _is_evaluated(self) -> bool:
        """Whether the validation texts are scored at this step."""
        every = self.config.eval.every
        return self.counters.step == self.config.train.steps or bool(
            every and self.counters.step and self.counters.step % every == 0
        )

    def _after_step(self) -> None:
        if self._is_evaluated():
            self._evaluate(self.data.validation)
        if self.counters.step == self.config.train.steps or self.counters.step % self.config.checkpoint.every == 0:
            self._save()

    def _evaluate(self, texts: tuple[TokenDataset | TaskDataset, ...]) -> None:
        """Score the beginning of each of these validation texts; the rows and the board get the numbers."""
        for dataset in texts:
            told = self.engine.reading(partial(self._validated, dataset))
            self.run.log_metrics(
                {"step": self.counters.step, "tokens": self.counters.tokens, "corpus": dataset.corpus, **told.row}
            )
            self.board.scalars(told.scalars, self.counters.step)
            self.progress.note(f"step {self.counters.step}: {told.words}")

    def _validated(self, dataset: TokenDataset | TaskDataset) -> Report:
        how: dict[str, Any] = {"autocast": self.engine.autocast, "should_stop": self._stop_evaluating}
        return validate(self.model, dataset, self.config, world=self.world, **how)

    def _stop_evaluating(self) -> bool:
        self.at(f"the evaluation at step {self.counters.step}")
        return self.stop.asked()

    def _save(self) -> None:
        self.at(f"the checkpoint at step {self.counters.step}")
        began = time.perf_counter()
        state = {
            **self.counters.state(),
            "spikes": self.guard.spikes.state(),
            "seq_len": self.config.data.seq_len,
            "fingerprint": self.data.train.fingerprint,
            "tokenizer": self.data.tokenizer.to_json(),
            "parent": self.parent,
        }
        tensors = self.engine.state()
        if (streams := self.stepper.streams) is not None:
            state["streams"], tensors["streams"] = streams.snapshot()
            state["rows"], state["micro_batch"] = self.config.batch_sequences, streams.micro_batch
        settings = configuration.fingerprint(self.config, FREE_TO_CHANGE)
        self.saver.save(self.counters.step, tensors, state, config=settings, dataset=self.data.train.fingerprint)
        self.stop.deadline.took_save(time.perf_counter() - began + self.saver.seconds)

    def _restore(self, resume: Path | None, fresh: bool) -> str:
        """Load the checkpoint to go on from, and say where that is; ValueError if the one asked for will not do."""
        path, own = by_first(self.world, lambda: choose(self.run, resume, fresh, self._complain))
        if path is None:
            self.run.truncate_metrics(0)
            return "from the beginning"
        self._load(path)
        step, name = self.counters.step, Path(path).name
        if own:
            self.saver.saved_step = step
            self.run.event("resume", step=step, path=name)
            if self._is_evaluated():
                self.scored = by_first(self.world, self._count_scored)
            return f"resumed at step {step} from {name}"
        self.parent = path
        self.run.event("fork", parent=path, step=step)
        return f"forked at step {step} from {path}"

    def _load(self, path: str) -> None:
        """Go on from the checkpoint at `path`."""
        loaded = together(self.world, lambda: checkpoint.load(Path(path)))
        together(self.world, lambda: self._take_over(loaded))

    def _take_over(self, loaded: checkpoint.Checkpoint) -> None:
        state, streams = loaded.state, self.stepper.streams
        check_state(loaded)
        refuse_others(loaded, self.config, self.data.train.fingerprint, self.world.data_size)
        try:
            self.engine.load_state(loaded.tensors)
            if streams is not None and "streams" in state:  # else they begin anew
                streams.load(state["streams"], loaded.tensors["streams"])
        except ValueError as error:
            raise ValueError(f"checkpoint {loaded.path}: {error}") from None
        self.counters.load(state)
        self.guard.spikes.load(state.get("spikes", Spikes().state()))  # earlier versions had none
        self.parent = state["parent"]
        cut = self.run.truncate_metrics(loaded.step)
        if cut:
            self.run.event("cut rows", beyond=loaded.step, rows=cut)

    def _load_own(self, path: str) -> None:
        """Go on from this checkpoint of the run itself."""
        self._load(path)
        self.saver.saved_step = self.counters.step

    def _count_scored(self) -> int:
        """The validation texts that have a row at this step: the first ones."""
        return sum(row.get("step") == self.counters.step and "split" in row for row in read_metrics(self.run.path))

    def _already_done(self) -> int:
        self.run.set_status("done", step=self.counters.step)
        self.progress.note(f"{self.run.path} is finished: {self.counters.step} steps; nothing to do")
        return DONE

    def _finish(self) -> int:
        folder = self.run.path
        if not self.saver.has_saved(self.counters.step):
            return self._not_saved()
        self.run.set_status("done", step=self.counters.step)
        self.progress.note(f"done: {folder}/checkpoints/step-{self.counters.step}; next: lmtrain eval {folder}")
        return DONE

    def _stopped(self) -> int:
        self.run.event("stop", step=self.counters.step, reason=self.stop.reason)
        if not self.saver.has_saved(self.counters.step):
            self._save()
        if not self.saver.has_saved(self.counters.step):
            return self._not_saved()
        reason = self.stop.reason
        self.run.set_status("stopped", step=self.counters.step, reason=reason)
        self.progress.note(
            f"stopped by {reason} at step {self.counters.step}, saved; the same command goes on from here"
        )
        return STOPPED

    def _not_saved(self) -> int:
        self.run.set_status("failed", step=self.counters.step, reason="the last checkpoint could not be written")
        return 1

    def _give_up(self, reason: str) -> int:
        self.saver.settle()
        reason = f"{reason} after {self.counters.rollbacks} roll-backs; try a lower optimizer.lr or another run.seed"
        self.run.set_status("failed", step=self.counters.step, reason=reason)
        self.progress.note(f"gave up at step {self.counters.step}: {reason}")
        return GAVE_UP

    def _complain(self, line: str) -> None:
        self.progress.note(f"warning: {line}")
