"""From the folder of a trained and evaluated run to its `RunResult`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmtrain.config import Config, reload
from lmtrain.run import read_metrics
from lmtrain.run.rows import read_rows
from lmtrain.sweep.cost import model_cost
from lmtrain.sweep.match import training_flops
from lmtrain.sweep.result import RunResult
from lmtrain.sweep.runs import Run, sparsity
from lmtrain.sweep.spec import Spec

STATE_LENGTH = 65536
"""Tokens after which all sweeps state the size of the decode state."""


def collect(run: Run, spec: Spec, folder: Path, evaluation: dict[str, Any], command: str) -> RunResult:
    """The result of the run in `folder`. evaluation: the object of `lmtrain eval --json`.

    ValueError if the loss is no number.
    """
    config = replace(run.config, model=reload(folder).model)  # with the vocabulary, which the text decided
    loss = evaluation["loss"]
    if loss is None or not math.isfinite(loss):
        raise ValueError(f"the validation loss is {loss}")
    return RunResult(
        name=run.name,
        hash=run.hash,
        axes=dict(run.axes),
        mixer="" if spec.mixer_axis is None else str(run.axes[spec.mixer_axis]),
        parent=None if run.parent is None else run.parent.name,
        group=run.group,
        command=command,
        environment=json.loads((folder / "environment.json").read_text()),
        **numbers_of(config, folder, evaluation, {config.data.seq_len, STATE_LENGTH}, run.begins),
    )


def numbers_of(
    config: Config, folder: Path, evaluation: Mapping[str, Any], lengths: Collection[int], begun: int = 0
) -> dict[str, Any]:
    """What a result says of any run: its configuration's costs, its folder's pace and memory, its evaluation's numbers.

    lengths: tokens after which the size of the decode state is stated; begun: steps that its parent has taken.
    """
    cost, length = model_cost(config), config.data.seq_len
    tokens = config.train.steps * config.train.batch_tokens
    pace, memory = pace_and_memory(folder, begun * config.train.batch_tokens)
    return {
        "seed": config.run.seed,
        "parameters": cost.cost.parameters - cost.embedding,
        "parameters_total": cost.cost.parameters,
        "tokens": tokens,
        "flops": training_flops(config, cost.cost.flops),
        "flops_per_token": cost.cost.flops / length,
        "pairs": cost.cost.pairs / length,
        "loss": evaluation["loss"],
        "bits_per_byte": evaluation.get("bits_per_byte"),
        "sparsity": sparsity(config),
        "strict": evaluation["causality"] == "strict",
        "scoring": evaluation["scoring"],
        "seconds": tokens / pace if pace else 0.0,
        "tokens_per_second": pace,
        "peak_memory": memory,
        "state_bytes": {str(n): model_cost(config, n).cost.state_bytes for n in sorted(lengths)},
    }


def pace_and_memory(folder: Path, begun: int) -> tuple[float, int]:
    """Tokens per second of the training steps in `folder` after the first `begun` tokens, and the most bytes held.

    Each row of metrics has the pace of the tokens since the row before; an event at its end has the memory.
    """
    steps = [{"tokens": begun}, *(row for row in read_metrics(folder) if row.get("tokens_per_second"))]
    seconds = sum((row["tokens"] - before["tokens"]) / row["tokens_per_second"] for before, row in pairwise(steps))
    peaks = [event["peak_memory"] for event in read_rows(folder / "events.jsonl") if "peak_memory" in event]
    return (steps[-1]["tokens"] - begun) / seconds if seconds else 0.0, max(peaks, default=0)
