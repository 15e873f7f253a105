"""Training: steps, evaluations and checkpoints in their order, so that a killed run resumes to the same weights.

At a step boundary the order is: row, evaluation, checkpoint. So whatever is older than a checkpoint is on the disk
when it is, and what is newer is cut from metrics.jsonl when the run resumes from it.

Several ranks do all of it together, each with rows of its own; the first one writes and prints.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attention.mixer import Context, parameter_count
from data.loader import Batch
from data.order import Ranges
from data.shards import TokenDataset
from data.tasks import TaskDataset
from lmtrain import checkpoint, exhausted, fault, watch
from lmtrain import config as configuration
from lmtrain.board import Board, curves_of_step
from lmtrain.config import Config
from lmtrain.deadline import Deadline, seconds_of
from lmtrain.evaluation.evaluate import EvaluationStopped
from lmtrain.evaluation.validation import Report, bits_per_byte, validate
from lmtrain.hardware import peak_flops, peak_memory, pick_device
from lmtrain.progress import Nowhere, Pace, Progress, Stopwatch, step_line
from lmtrain.resume import check_state, choose, choose_before, refuse_others
from lmtrain.run import RunDirectory, RunFolder, read_metrics
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
from lmtrain.spikes import Spikes, Verdict
from lmtrain.streams import Streams
from parallel.agree import AgreedError, by_first, first_before_others, together
from parallel.engine import StepInfo
from parallel.sequence import SequenceShard, even_lengths
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
        self.debug = debug
        self.world = world
        self.at = at
        self.progress = Progress(None if world.is_first else Nowhere(), keep=run.log)
        self.device = pick_device()
        self.data: Data = first_before_others(world, lambda: build_data(config))
        self.config = config = with_vocabulary(config, self.data.tokenizer)
        self.model = build_model(config, self.device)
        # Before the engine: it may put weights away, and then they have no sizes to be read.
        self.parameters = parameter_count(self.model)
        stop.deadline.expect_save(12 * self.parameters)
        self.step_flops = 3 * self.model.cost(config.data.seq_len).flops * config.batch_sequences
        self.engine = build_engine(config, self.model, self.device, world)
        self.unread: Ranges = ()  # samples that roll-backs left out
        self.loader = make_loader(config, self.data.train, world)
        micro_batch = config.micro_batch(world.data_size)
        self.streams = Streams(self.model, micro_batch, config.carry, world) if config.data.stream else None
        self.shard: SequenceShard | None = None
        if world.sequence > 1:
            self.shard = SequenceShard(world, even_lengths(config.data.seq_len, world.sequence))
        self.step = self.samples = self.tokens = self.skipped = self.skips_in_a_row = self.rollbacks = 0
        self.spikes = Spikes()
        self.is_spike = False
        background = config.checkpoint.asynchronous
        background = self.device.type == "cuda" if background is None else background
        self.saver = Saver(run, world, keep=config.checkpoint.keep, background=background, complain=self._complain)
        self.parent: str | None = None
        self.scored = len(self.data.validation)  # at this step; fewer where the run was stopped in its evaluation
        self.seconds = Stopwatch()
        peak = peak_flops(self.device, config.train.dtype)
        self.peak_flops = None if peak is None else peak * world.size
        self.board: Board | None = None

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
        if self.world.is_first and not (self.run.path / "config.yaml").exists():
            configuration.save(self.config, self.run.path / "config.yaml")
        if self.step >= self.config.train.steps and self.scored >= len(self.data.validation):
            return self._already_done()
        self._introduce(start)
        code = None
        try:
            with self.saver:
                while code is None:
                    wanted = self.config.log.tensorboard and self.world.is_first
                    self.board = Board(self.run.tensorboard, self._complain, wanted, purge_step=self.step + 1)
                    with closing(self.board):
                        code = self._train()
        finally:
            self.run.event("memory", step=self.step, peak_memory=peak_memory(self.device))
        return code

    def _train(self) -> int | None:
        """From here to the end, and the exit code; or up to a roll-back, and None: then again from there."""
        try:
            self._evaluate(self.data.validation[self.scored :])
        except EvaluationStopped:
            return self._stopped()
        self.scored = len(self.data.validation)
        with closing(self.loader.batches(self.samples)) as steps:
            while self.step < self.config.train.steps:
                self.saver.report()
                if self.stop.asked():
                    return self._stopped()
                self.at(f"step {self.step + 1}, its batches")
                began = time.perf_counter()
                info = self._one_step(next(steps))
                self.stop.deadline.took_step(time.perf_counter() - began)
                if self.skips_in_a_row >= self.config.train.max_skips:
                    reason = (
                        f"{self.skips_in_a_row} updates in a row were skipped (loss {info.loss}, gradient norm "
                        f"{info.grad_norm})"
                    )
                    return None if self._roll_back(reason) else self._give_up(reason)
                if self.is_spike and self.config.train.spikes == "rollback":
                    reason = f"a spike (loss {info.loss}, gradient norm {info.grad_norm})"
                    if self._roll_back(reason):
                        return None
                    if self.rollbacks >= self.config.train.max_rollbacks:
                        return self._give_up(reason)
                try:
                    self._after_step()
                except EvaluationStopped:
                    return self._stopped()
        return self._finish()

    def _one_step(self, batches: list[Batch]) -> StepInfo:
        """Forward and backward over the micro-batches, one update, counters, and its row if it is logged."""
        with self.seconds:
            if self.shard is not None:
                batches = [batch.part(self.shard.tokens) for batch in batches]
                self.shard.sent = 0
            batches = [fault.before_forward(batch) for batch in batches]
            scored, crc = self._over_ranks(
                sum(int((batch.labels >= 0).sum()) for batch in batches), sum(batch.crc for batch in batches)
            )
            statistics: dict[Any, Any] | None = {} if self._is_logged(self.step + 1) else None
            for micro, batch in enumerate(batches):
                ctx = Context(
                    positions=_to(batch.positions, self.device),
                    document_ends=_to(batch.document_ends, self.device),
                    statistics=statistics if micro == len(batches) - 1 else None,
                    debug=self.debug,
                    shard=self.shard,
                )
                self.at(f"step {self.step + 1}, micro-batch {micro + 1} of {len(batches)}")
                number = micro * self.world.data_size + self.world.data_rank  # in the step, whoever reads it
                seed = _seed(self.config.run.seed, self.step, number, self.world.sequence_rank)
                state = None if self.streams is None else self.streams.at(micro, batch.begins)
                loss = self.engine.forward_loss(batch.tokens, batch.labels, ctx, scored, seed, state)
                self.engine.backward(fault.before_backward(self.step + 1, loss))
            self.at(f"step {self.step + 1}, the update")
            fault.before_update(self.step + 1)
            info = self._update(learning_rate(self.step, self.config.train.steps, self.config.optimizer))
            mixers = watch.read(statistics or {})
        self.step += 1
        self.samples = self.loader.after(self.samples)
        self.tokens += self.config.train.batch_tokens
        self.skips_in_a_row = self.skips_in_a_row + 1 if info.skipped else 0
        self.skipped += info.skipped
        if info.skipped:
            if self.streams is not None:
                self.streams.drop()
            self.run.event("skip", step=self.step, loss=info.loss, grad_norm=info.grad_norm)
        self._log(info, crc % 2**32, mixers)
        return info

    def _update(self, lr: float) -> StepInfo:
        """The engine's step, and whether it was a spike; with the policy `skip` then it changes nothing."""
        self.is_spike = False
        if self.config.train.spikes == "skip":
            return self.engine.step(lr, self._is_usual)
        info = self.engine.step(lr)
        if not info.skipped:
            self._is_usual(info.loss, info.grad_norm)
        return info

    def _is_usual(self, loss: float, grad_norm: float) -> bool:
        """Whether the step is no spike: the same on all ranks, as loss and norm are."""
        verdict = self.spikes.judge(loss, grad_norm)
        self.is_spike = verdict.beyond(self.config.train.spike_limit)
        if self.is_spike:
            self._tell_spike(loss, grad_norm, verdict)
        return not self.is_spike

    def _tell_spike(self, loss: float, grad_norm: float, verdict: Verdict) -> None:
        far = {"loss": verdict.loss, "grad_norm": verdict.grad_norm}
        samples = [self.samples, self.loader.after(self.samples)]
        numbers = {"step": self.step + 1, "loss": loss, "grad_norm": grad_norm, "deviations": far, "samples": samples}
        self.run.event("spike", policy=self.config.train.spikes, **numbers)
        self._complain(
            f"spike at step {self.step + 1}: loss {loss:.4f} is {verdict.loss:.1f} deviations above what is usual, the "
            f"gradient norm {grad_norm:.2f} {verdict.grad_norm:.1f}"
        )

    def _over_ranks(self, *numbers: int) -> list[int]:
        """The sum of each number over the ranks."""
        told = torch.tensor(numbers, device=self.world.device)
        self.world.sum_([told])
        return told.tolist()

    def _is_logged(self, step: int) -> bool:
        """Whether this step has a row whatever happens in it; a skipped one has one, too."""
        return step % self.config.log.every == 0 or step in (1, self.config.train.steps)

    def _is_evaluated(self) -> bool:
        """Whether the validation texts are scored at this step."""
        every = self.config.eval.every
        return self.step == self.config.train.steps or bool(every and self.step and self.step % every == 0)

    def _after_step(self) -> None:
        if self._is_evaluated():
            self._evaluate(self.data.validation)
        if self.step == self.config.train.steps or self.step % self.config.checkpoint.every == 0:
            self._save()

    def _log(self, info: StepInfo, crc: int, mixers: watch.Mixers) -> None:
        """The progress line of this step; every `log.every` steps also its row, and the board's scalars."""
        config = self.config
        logged = self._is_logged(self.step) or info.skipped
        steps_per_second = self.seconds.laps / self.seconds.total
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": info.loss,
            "lr": info.lr,
            "grad_norm": info.grad_norm,
            "tokens_per_second": config.train.batch_tokens * steps_per_second,
            "skipped": self.skipped,
            "batch": crc,
            "causality": self.model.causality,
        }
        if info.auxiliary:
            row["auxiliary"] = info.auxiliary
        if mixers:
            row["mixers"] = mixers
        if self.shard is not None:
            sequences = config.batch_sequences // self.world.data_size
            row["sent_per_token"] = self.shard.sent / (sequences * self.shard.lengths[self.shard.rank])
        seen = Pace(
            steps=config.train.steps,
            bits_per_byte=bits_per_byte(info.loss, self.data.train),
            flops=self.step_flops * steps_per_second,
            peak_flops=self.peak_flops,
            memory=peak_memory(self.device),
            seconds_left=(config.train.steps - self.step) / steps_per_second,
        )
        self.progress.update(step_line(row, seen), logged)
        if not logged:
            return
        self.run.log_metrics(row)
        self._scalars(curves_of_step(row, seen) | watch.tags(mixers))
        self.seconds.reset()

    def _evaluate(self, texts: tuple[TokenDataset | TaskDataset, ...]) -> None:
        """Score the beginning of each of these validation texts; the rows and the board get the numbers."""
        for dataset in texts:
            told = self.engine.reading(partial(self._validated, dataset))
            self.run.log_metrics({"step": self.step, "tokens": self.tokens, "corpus": dataset.corpus, **told.row})
            self._scalars(told.scalars)
            self.progress.note(f"step {self.step}: {told.words}")

    def _validated(self, dataset: TokenDataset | TaskDataset) -> Report:
        how: dict[str, Any] = {"autocast": self.engine.autocast, "should_stop": self._stop_evaluating}
        return validate(self.model, dataset, self.config, world=self.world, **how)

    def _stop_evaluating(self) -> bool:
        self.at(f"the evaluation at step {self.step}")
        return self.stop.asked()

    def _save(self) -> None:
        self.at(f"the checkpoint at step {self.step}")
        began = time.perf_counter()
        state = {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "skips_in_a_row": self.skips_in_a_row,
            "rollbacks": self.rollbacks,
            "unread": self.unread,
            "spikes": self.spikes.state(),
            "seq_len": self.config.data.seq_len,
            "fingerprint": self.data.train.fingerprint,
            "tokenizer": self.data.tokenizer.to_json(),
            "parent": self.parent,
        }
        tensors = self.engine.state()
        if self.streams is not None:
            state["streams"], tensors["streams"] = self.streams.snapshot()
            state["rows"], state["micro_batch"] = self.config.batch_sequences, self.streams.micro_batch
        settings = configuration.fingerprint(self.config, FREE_TO_CHANGE)
        self.saver.save(self.step, tensors, state, config=settings, dataset=self.data.train.fingerprint)
        self.stop.deadline.took_save(time.perf_counter() - began + self.saver.seconds)

    def _restore(self, resume: Path | None, fresh: bool) -> str:
        """Load the checkpoint to go on from, and say where that is; ValueError if the one asked for will not do."""
        path, own = by_first(self.world, lambda: choose(self.run, resume, fresh, self._complain))
        if path is None:
            self.run.truncate_metrics(0)
            return "from the beginning"
        loaded = together(self.world, lambda: checkpoint.load(Path(path)))
        together(self.world, lambda: self._load(loaded))
        if own:
            self.saver.saved_step = self.step
            self.run.event("resume", step=self.step, path=loaded.path.name)
            if self._is_evaluated():
                self.scored = by_first(self.world, self._count_scored)
            return f"resumed at step {self.step} from {loaded.path.name}"
        self.parent = path
        self.run.event("fork", parent=path, step=self.step)
        return f"forked at step {self.step} from {path}"

    def _load(self, loaded: checkpoint.Checkpoint) -> None:
        state = loaded.state
        check_state(loaded)
        refuse_others(loaded, self.config, self.data.train.fingerprint, self.world.data_size)
        try:
            self.engine.load_state(loaded.tensors)
            if self.streams is not None and "streams" in state:  # else they begin anew
                self.streams.load(state["streams"], loaded.tensors["streams"])
        except ValueError as error:
            raise ValueError(f"checkpoint {loaded.path}: {error}") from None
        self.step, self.samples, self.tokens = state["step"], state["samples"], state["tokens"]
        self.skipped, self.skips_in_a_row = state["skipped"], state["skips_in_a_row"]
        # Checkpoints of earlier versions know nothing of the rest.
        self.rollbacks = state.get("rollbacks", 0)
        self._leave_out(tuple((first, last) for first, last in state.get("unread", ())))
        self.spikes.load(state.get("spikes", Spikes().state()))
        self.parent = state["parent"]
        cut = self.run.truncate_metrics(self.step)
        if cut:
            self.run.event("cut rows", beyond=self.step, rows=cut)

    def _count_scored(self) -> int:
        """The validation texts that have a row at this step: the first ones."""
        return sum(row.get("step") == self.step and "split" in row for row in read_metrics(self.run.path))

    def _leave_out(self, unread: Ranges) -> None:
        """Never read these samples."""
        self.unread = unread
        self.loader = make_loader(self.config, self.data.train, self.world, unread)

    def _roll_back(self, reason: str) -> bool:
        """Go back to the newest checkpoint before the trouble, never to read again what was read since; False if there
        is none, or it was done too often. (The same samples would bring the same weights to the same place.)"""
        if self.rollbacks >= self.config.train.max_rollbacks or self.config.data.stream:
            return False
        self.saver.settle()
        step, samples, unread, rollbacks = self.step, self.samples, self.unread, self.rollbacks
        good = step - max(self.skips_in_a_row, 1)
        path = by_first(self.world, lambda: choose_before(self.run, good, self._complain))
        if path is None:
            return False
        loaded = together(self.world, lambda: checkpoint.load(Path(path)))
        together(self.world, lambda: self._load(loaded))
        self.saver.saved_step = self.step
        self.run.set_status("running", step=self.step, checkpoint=path)
        self.rollbacks = rollbacks + 1
        self._leave_out((*unread, (self.samples, samples)))
        self.run.event("rollback", step=step, to=self.step, samples=[self.samples, samples], reason=reason)
        self._complain(
            f"step {step}: {reason}: back to step {self.step}, and on without the samples "
            f"{self.samples} to {samples - 1} (roll-back {self.rollbacks} of {self.config.train.max_rollbacks})"
        )
        return True

    def _introduce(self, start: str) -> None:
        model, config = self.config.model, self.config
        data = self.data.train
        amount = "fresh examples" if isinstance(data, TaskDataset) else f"{len(data.tokens):,} training tokens"
        self.progress.note(
            f"{self.run.path.name}: {model.layers} layers of {model.pattern!r}, "
            f"{self.parameters:,} parameters, {self.device.type}"
            + (f" with {torch.get_num_threads()} threads" if self.device.type == "cpu" else "")
        )
        self.progress.note(
            f"{data.corpus}: {amount} ({self.data.tokenizer.name}), "
            f"{config.batch_sequences} sequences of {config.data.seq_len} per step, {config.train.steps} steps, {start}"
        )
        for note in self.data.notes:
            self.progress.note(note)
        if self.model.causality != "strict":
            self.progress.note(
                "this model sees ahead: what it selects depends on later tokens, so its training loss is too low "
                "and no code length; evaluations score prefix by prefix: quote and compare those"
            )

    def _already_done(self) -> int:
        self.run.set_status("done", step=self.step)
        self.progress.note(f"{self.run.path} is finished: {self.step} steps; nothing to do")
        return DONE

    def _finish(self) -> int:
        folder = self.run.path
        if not self.saver.has_saved(self.step):
            return self._not_saved()
        self.run.set_status("done", step=self.step)
        self.progress.note(f"done: {folder}/checkpoints/step-{self.step}; next: lmtrain eval {folder}")
        return DONE

    def _stopped(self) -> int:
        self.run.event("stop", step=self.step, reason=self.stop.reason)
        if not self.saver.has_saved(self.step):
            self._save()
        if not self.saver.has_saved(self.step):
            return self._not_saved()
        reason = self.stop.reason
        self.run.set_status("stopped", step=self.step, reason=reason)
        self.progress.note(f"stopped by {reason} at step {self.step}, saved; the same command goes on from here")
        return STOPPED

    def _not_saved(self) -> int:
        self.run.set_status("failed", step=self.step, reason="the last checkpoint could not be written")
        return 1

    def _give_up(self, reason: str) -> int:
        self.saver.settle()
        reason = f"{reason} after {self.rollbacks} roll-backs; try a lower optimizer.lr or another run.seed"
        self.run.set_status("failed", step=self.step, reason=reason)
        self.progress.note(f"gave up at step {self.step}: {reason}")
        return GAVE_UP

    def _scalars(self, values: dict[str, float]) -> None:
        assert self.board is not None
        self.board.scalars(values, self.step)

    def _complain(self, line: str) -> None:
        self.progress.note(f"warning: {line}")


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _seed(*where: int) -> int:
    """Dropout's seed, from (seed, step, micro-batch in the step, slice of its tokens) alone: no random state has to
    survive a restart, and a micro-batch has the same dropout whichever rank reads it."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, where)).encode(), digest_size=8).digest()) >> 1
