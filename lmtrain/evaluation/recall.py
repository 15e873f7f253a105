"""The result of asking a model about a synthetic task, at one length or several, and what it is called."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.disk import sha256_json
from data.tasks import TaskDataset
from lmtrain.evaluation.accuracy import Accuracy, check_length, evaluate_task
from lmtrain.model import DecoderLM
from lmtrain.table import table

EXAMPLES = 512
"""Of each length; they are shared among the variants of a task."""


@dataclass(frozen=True)
class Recall:
    """dataset: as asked for; cells: of each of the `lengths` in turn, what became of each variant of the task."""

    dataset: TaskDataset
    lengths: tuple[int, ...]
    cells: tuple[Accuracy, ...]

    @property
    def corpus(self) -> str:
        """What the result must be called."""
        return self.dataset.task.title(*self.lengths)

    @property
    def fingerprint(self) -> str:
        """Of all examples that were asked."""
        of_cells = [cell.dataset.fingerprint for cell in self.cells]
        return of_cells[0] if len(of_cells) == 1 else sha256_json(of_cells)

    @property
    def total(self) -> Accuracy:
        """Of all cells together; its dataset is the longest one."""
        cells = self.cells
        scored = sum(cell.scored_tokens for cell in cells)
        one_pass = sum((cell.one_pass or 0.0) * cell.scored_tokens for cell in cells) / scored
        return replace(
            max(cells, key=lambda cell: cell.dataset.length),
            nats=sum(cell.nats for cell in cells),
            scored_tokens=scored,
            right_tokens=sum(cell.right_tokens for cell in cells),
            examples=sum(cell.examples for cell in cells),
            right_examples=sum(cell.right_examples for cell in cells),
            standard_error=math.hypot(*(cell.scored_tokens * cell.standard_error for cell in cells)) / scored,
            one_pass=None if cells[0].one_pass is None else one_pass,
        )

    def variant(self, cell: Accuracy) -> dict[str, Any]:
        """The settings that the task left open and that are special about a cell."""
        settings = self.dataset.settings
        return {key: value for key, value in cell.dataset.settings.items() if value != settings[key]}

    @property
    def name(self) -> str:
        """A file name that says what was asked."""
        return re.sub(r"[^A-Za-z0-9_.+-]", "_", f"{self.corpus}-{self.dataset.split}-{self.fingerprint[:8]}")

    def to_json(self, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The row of `eval --json`; `grid`: each cell, if there are several. source: `Restored.source`."""
        total = self.total
        row: dict[str, Any] = {
            "corpus": self.corpus,
            "task": self.dataset.task.name,
            "settings": self.dataset.settings,
            "fingerprint": self.fingerprint,
            "tokenizer": self.dataset.tokenizer.name,
            **total.row(),
            "token_perplexity": math.exp(total.loss) if total.loss < 700 else None,
            "word_perplexity": None,
            "bytes": None,
            "words": None,
            "checkpoint": None,
            "step": None,
            **(source or {}),
        }
        if len(self.cells) > 1:
            row["grid"] = [
                {"length": cell.dataset.length, **self.variant(cell), **_numbers(cell)} for cell in self.cells
            ]
        return row


def evaluate_recall(
    model: DecoderLM, dataset: TaskDataset, lengths: Sequence[int], examples: int | None = None, **how: Any
) -> Recall:
    """Asks the first examples of each variant of the task at each length.

    examples: of each variant and length (default: together `EXAMPLES` of each length). The rest is as in
    `evaluate_task`; ValueError for a length that the task or the model does not fit, before any is asked.
    """
    variants = dataset.task.variants()
    datasets = [replace(dataset, task=task, length=length) for length in lengths for task in variants]
    for each in datasets:
        check_length(model, each)
    examples = examples or max(1, EXAMPLES // len(variants))
    cells = tuple(evaluate_task(model, each, examples=examples, **how) for each in datasets)
    return Recall(dataset, tuple(lengths), cells)


def format_recall(recall: Recall) -> str:
    """The result for people."""
    total = recall.total
    error = "" if math.isnan(total.standard_error) else f" +- {total.standard_error:.4f}"
    lines = [
        f"{recall.corpus} {total.dataset.split}: accuracy {total.accuracy:.4f}{error} "
        f"({total.scoring}, {total.causality})",
        f"  {total.right_tokens:,} of {total.scored_tokens:,} labels; all labels right in {total.right_examples:,} of "
        f"{total.examples:,} examples; {total.loss:.4f} nats per label",
    ]
    if total.one_pass is not None:
        lines.append(f"  one pass, which sees what follows the question, claims {total.one_pass:.4f}: do not quote it")
    if len(recall.cells) > 1:
        lines += ["", _grid(recall)]
    return "\n".join(lines)


def rows_of(recall: Recall) -> list[list[Accuracy]]:
    """The cells of each length."""
    size = len(recall.cells) // len(recall.lengths)
    return [list(recall.cells[first : first + size]) for first in range(0, len(recall.cells), size)]


def variant_names(recall: Recall) -> list[str]:
    """Heads of the columns: what is special about each variant."""
    told = [recall.variant(cell) for cell in rows_of(recall)[0]]
    return [", ".join(f"{key} {value:g}" for key, value in variant.items()) or "accuracy" for variant in told]


def _grid(recall: Recall) -> str:
    rows = [
        [f"{length:,}", *(f"{cell.accuracy:.3f}" for cell in cells)]
        for length, cells in zip(recall.lengths, rows_of(recall), strict=True)
    ]
    return table(["tokens", *variant_names(recall)], rows)


def _numbers(cell: Accuracy) -> dict[str, Any]:
    row = cell.row()
    kept = ("accuracy", "accuracy_standard_error", "example_accuracy", "loss", "examples", "one_pass_accuracy")
    return {key: row[key] for key in kept if key in row}
