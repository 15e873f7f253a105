"""Evaluations of trained runs as the command line asks for them: `lmtrain eval` and `lmtrain compare`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.dataset import TokenDataset
from lmtrain.evaluation import plot as evaluation_plot
from lmtrain.evaluation.compare import Comparison, compare, no_texts, read_row, text_sha256
from lmtrain.evaluation.contexts import evaluate_by_context
from lmtrain.evaluation.evaluate import Evaluation, evaluate, evaluate_carried
from lmtrain.evaluation.result import write_result
from lmtrain.picture import check_picture
from lmtrain.restore import Restored, open_run
from lmtrain.setup import read_split, read_task
from lmtrain.waiting import Waiting


@dataclass(frozen=True)
class Asked:
    """What is scored, and how; None: as the run's configuration says.

    on: `corpus[:split]`, path: its file. documents: None, or the rule of another run that this one is compared with.
    by_document, by_context: these numbers besides. plot: where to draw the losses by position and by context.
    """

    on: str | None = None
    path: str | None = None
    context: int | None = None
    stride: int | None = None
    carry: bool = False
    prefixes: int | None = None
    by_document: bool = False
    by_context: bool = False
    plot: Path | None = None
    documents: str | None = None

    def __post_init__(self) -> None:
        if self.carry and (self.context or self.stride or self.by_context):
            raise ValueError(
                "--carry reads the text once, without windows: it takes no --context, no --stride and no --by-context"
            )


@dataclass(frozen=True)
class Result:
    """An evaluation, its row, and the file that keeps it."""

    evaluation: Evaluation
    row: dict[str, Any]
    kept: Path


def evaluate_run(run: Path | Restored, asked: Asked) -> Result:
    """Scores a run's folder or one of its checkpoints; keeps the row in its `eval/`. ValueError says what is wrong."""
    if asked.plot is not None:
        check_picture(asked.plot, evaluation_plot.FORMATS)
    restored = run if isinstance(run, Restored) else open_run(run)
    if asked.prefixes and restored.model.causality == "strict":
        raise ValueError("--prefixes: this model is strict, its one pass is what every prefix says; leave it out")
    if asked.by_document and restored.model.causality != "strict":
        raise ValueError(
            f"{restored.run} selects ahead: of such a model a sample of prefixes is scored, so there are no numbers by "
            "document"
        )
    dataset = read_split(restored.config, restored.tokenizer, asked.on, asked.path)
    evaluation = _evaluate(restored, dataset, asked)
    source = restored.source
    if asked.by_document:
        source["text_sha256"] = text_sha256(dataset)
    row = evaluation.to_json(source, asked.by_document)
    kept = write_result(restored.run, evaluation.name, row)
    if asked.plot is not None:
        evaluation_plot.draw(evaluation, asked.plot)
    return Result(evaluation, row, kept)


def compare_runs(a: Path, b: Path, asked: Asked) -> Comparison:
    """Compares two models, each a run, a checkpoint, or a result that `eval --by-document` kept.

    Both are scored alike: as `asked`, or else as the configuration of the first says, or as it was. ValueError as of
    `compare`, and for wishes where nothing is to be scored.
    """
    if a.is_file() and b.is_file() and asked != Asked():
        raise ValueError(f"{a} and {b} are kept: nothing is scored, so how has no effect; leave out all options")
    first = _row(a, asked)
    alike = replace(asked, documents=first["documents"])
    if not (a.is_file() and (asked.context or asked.stride or asked.carry)):
        how = {"context": first["context"], "stride": first["stride"], "carry": first["context"] is None}
        alike = replace(alike, **how)
    return compare(first, _row(b, alike))


def _row(path: Path, asked: Asked) -> dict[str, Any]:
    if path.is_file():
        return read_row(path)
    restored = open_run(path)
    if (task := read_task(restored.config, restored.tokenizer, asked.on)) is not None:
        raise ValueError(f"{path}: {no_texts(task.task.name)}")
    return evaluate_run(restored, replace(asked, by_document=True)).row


def _evaluate(restored: Restored, dataset: TokenDataset, asked: Asked) -> Evaluation:
    config, model = restored.config, restored.model
    how: dict[str, Any] = {"documents": asked.documents or config.data.documents, "autocast": restored.autocast}
    if asked.carry:
        return evaluate_carried(model, dataset, seq_len=config.data.seq_len, carry=config.carry, **how)
    context = asked.context or config.eval_context
    stride = asked.stride or (config.eval.stride if asked.context is None else None) or context
    how["watch"] = Waiting()
    by_context = (
        evaluate_by_context(model, dataset, context=context, trained_length=config.data.seq_len, **how)
        if asked.by_context
        else ()
    )
    evaluation = evaluate(model, dataset, context=context, stride=stride, prefixes=asked.prefixes, **how)
    return replace(evaluation, by_context=by_context)
