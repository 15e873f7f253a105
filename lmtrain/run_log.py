"""What a run tells: of itself as it starts, and of each step a line, a row of metrics.jsonl, curves."""

from __future__ import annotations

import torch

from attention.mixer import parameter_count
from data.tasks import TaskDataset
from lmtrain import watch
from lmtrain.board import Board, curves_of_step
from lmtrain.config import Config
from lmtrain.counters import Counters
from lmtrain.evaluation.validation import bits_per_byte
from lmtrain.hardware import peak_flops, peak_memory
from lmtrain.model import DecoderLM
from lmtrain.progress import Pace, Progress, Stopwatch, step_line
from lmtrain.run import RunFolder
from lmtrain.run.rows import Row
from lmtrain.setup import Data
from lmtrain.step import Step
from parallel.world import World


class RunLog:
    """Speaks to people, into metrics.jsonl and to the board. To be made before the engine: it may put weights away.

    parameters: how many the model has. seconds: to be entered while a step is made, for the pace since the last row.
    """

    def __init__(
        self,
        config: Config,
        model: DecoderLM,
        data: Data,
        device: torch.device,
        world: World,
        run: RunFolder,
        progress: Progress,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.run, self.progress = run, progress
        self.causality = model.causality
        self.parameters = parameter_count(model)
        self.step_flops = 3 * model.cost(config.data.seq_len).flops * config.batch_sequences
        peak = peak_flops(device, config.train.dtype)
        self.peak_flops = None if peak is None else peak * world.size
        self.seconds = Stopwatch()

    def introduce(self, start: str) -> None:
        """What is trained on what, and from where: `start`."""
        model, config, text = self.config.model, self.config, self.data.train
        amount = "fresh examples" if isinstance(text, TaskDataset) else f"{len(text.tokens):,} training tokens"
        self.progress.note(
            f"{self.run.path.name}: {model.layers} layers of {model.pattern!r}, "
            f"{self.parameters:,} parameters, {self.device.type}"
            + (f" with {torch.get_num_threads()} threads" if self.device.type == "cpu" else "")
        )
        self.progress.note(
            f"{text.corpus}: {amount} ({self.data.tokenizer.name}), "
            f"{config.batch_sequences} sequences of {config.data.seq_len} per step, {config.train.steps} steps, {start}"
        )
        for note in self.data.notes:
            self.progress.note(note)
        if self.causality != "strict":
            self.progress.note(
                "this model sees ahead: what it selects depends on later tokens, so its training loss is too low "
                "and no code length; evaluations score prefix by prefix: quote and compare those"
            )

    def has_row(self, step: int) -> bool:
        """Whether this step has a row whatever happens in it; a skipped one has one, too."""
        return step % self.config.log.every == 0 or step in (1, self.config.train.steps)

    def tell(self, step: Step, counters: Counters, board: Board) -> None:
        """The line of the step; if it has a row, this, and the scalars for the board."""
        logged = self.has_row(counters.step) or step.info.skipped
        per_second = self.seconds.laps / self.seconds.total
        row = self._row(step, counters, per_second)
        pace = Pace(
            steps=self.config.train.steps,
            bits_per_byte=bits_per_byte(step.info.loss, self.data.train),
            flops=self.step_flops * per_second,
            peak_flops=self.peak_flops,
            memory=peak_memory(self.device),
            seconds_left=(self.config.train.steps - counters.step) / per_second,
        )
        self.progress.update(step_line(row, pace), logged)
        if logged:
            self.run.log_metrics(row)
            board.scalars(curves_of_step(row, pace) | watch.tags(step.mixers), counters.step)
            self.seconds.reset()

    def _row(self, step: Step, counters: Counters, steps_per_second: float) -> Row:
        row: Row = {
            "step": counters.step,
            "tokens": counters.tokens,
            "loss": step.info.loss,
            "lr": step.info.lr,
            "grad_norm": step.info.grad_norm,
            "tokens_per_second": self.config.train.batch_tokens * steps_per_second,
            "skipped": counters.skipped,
            "batch": step.crc,
            "causality": self.causality,
        }
        if step.info.auxiliary:
            row["auxiliary"] = step.info.auxiliary
        if step.mixers:
            row["mixers"] = step.mixers
        if step.sent is not None:
            row["sent_per_token"] = step.sent
        return row
