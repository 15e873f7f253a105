"""Evaluation in training: how the validation split is scored, and what the run then says of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.shards import TokenDataset
from data.tasks import TaskDataset
from lmtrain.config import Config
from lmtrain.evaluation.accuracy import Accuracy, evaluate_task
from lmtrain.evaluation.evaluate import Evaluation, evaluate, evaluate_carried
from lmtrain.evaluation.scoring import Autocast
from lmtrain.model import DecoderLM
from parallel.world import World


@dataclass(frozen=True)
class Report:
    """An evaluation as its row of metrics.jsonl, the board's scalars, and words for people."""

    row: dict[str, Any]
    scalars: dict[str, float]
    words: str


def validate(
    model: DecoderLM,
    dataset: TokenDataset | TaskDataset,
    config: Config,
    *,
    autocast: Autocast,
    should_stop: Callable[[], bool],
    world: World,
) -> Report:
    """Score the beginning of a split as the model is trained: a task by its examples, a text by its tokens.

    What trains on streams is scored with its state carried, unless windows are asked for.
    """
    how: dict[str, Any] = {"autocast": autocast, "should_stop": should_stop}
    if isinstance(dataset, TaskDataset):
        examples = max(1, config.eval.tokens // dataset.length)
        return _of_task(evaluate_task(model, dataset, examples=examples, world=world, **how))
    how |= {"max_tokens": config.eval.tokens, "documents": config.data.documents}
    if config.data.stream and config.eval.context is None:
        return _of_text(evaluate_carried(model, dataset, seq_len=config.data.seq_len, carry=config.carry, **how))
    how |= {"context": config.eval_context, "stride": config.eval_stride, "world": world}
    return _of_text(evaluate(model, dataset, **how))


def bits_per_byte(loss: float, dataset: TokenDataset | TaskDataset) -> float | None:
    """Loss in nats per token as bits per byte, by the split's mean bytes per token; a task has no bytes."""
    if isinstance(dataset, TaskDataset):
        return None
    return loss / math.log(2) / dataset.bytes_per_token


def _of_text(result: Evaluation) -> Report:
    protocol = result.protocol
    row = {
        "split": protocol.split,
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "scored_tokens": result.scored_tokens,
        "context": protocol.context,
        "stride": protocol.stride,
        "scoring": protocol.scoring,
        "causality": protocol.causality,
    }
    scalars = {f"eval/{protocol.corpus}/loss": result.loss, f"eval/{protocol.corpus}/bpb": result.bits_per_byte}
    windows = f"context {protocol.context}, stride {protocol.stride}"
    reach = windows if protocol.carry is None else f"carry {protocol.carry}"
    words = (
        f"validation loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte "
        f"({result.scored_tokens:,} tokens of {protocol.corpus}, {protocol.scoring}, {reach})"
    )
    return Report(row, scalars, words + _warning(protocol.causality))


def _of_task(result: Accuracy) -> Report:
    corpus = result.dataset.corpus
    scalars = {f"eval/{corpus}/loss": result.loss, f"eval/{corpus}/accuracy": result.accuracy}
    words = (
        f"validation loss {result.loss:.4f}, accuracy {result.accuracy:.4f} "
        f"({result.scored_tokens:,} labels of {result.examples:,} examples of {corpus}, {result.scoring})"
    )
    return Report(result.row(), scalars, words + _warning(result.causality))


def _warning(causality: str) -> str:
    return "" if causality == "strict" else "; the losses of training see ahead and do not compare"
