"""From the folder of a trained and evaluated run to its `RunResult`."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmtrain.config import reload
from lmtrain.run import read_metrics
from lmtrain.run.rows import read_rows
from lmtrain.sweep.cost import model_cost
from lmtrain.sweep.match import training_flops
from lmtrain.sweep.result import RunResult
from lmtrain.sweep.runs import Run
from lmtrain.sweep.spec import Spec

STATE_LENGTH = 65536
"""Tokens after which all sweeps state the size of the decode state."""


def collect(run: Run, spec: Spec, folder: Path, evaluation: dict[str, Any], command: str) -> RunResult:
    """The result of the run in `folder`. evaluation: the object of `lmtrain eval --json`.

    ValueError if the loss is no number.
    """
    config = reload(folder)  # with the vocabulary, which the text decided
    length = config.data.seq_len
    cost = model_cost(config)
    loss = evaluation["loss"]
    if loss is None or not math.isfinite(loss):
        raise ValueError(f"the validation loss is {loss}")
    pace, memory = pace_and_memory(folder, run.begins * run.config.train.batch_tokens)
    mixer = "" if spec.mixer_axis is None else str(run.axes[spec.mixer_axis])
    states = {n: model_cost(config, n).cost.state_bytes for n in sorted({length, STATE_LENGTH})}
    return RunResult(
        name=run.name,
        hash=run.hash,
        axes=dict(run.axes),
        mixer=mixer,
        seed=run.config.run.seed,
        parameters=cost.cost.parameters - cost.embedding,
        parameters_total=cost.cost.parameters,
        tokens=run.tokens,
        flops=training_flops(config, cost.cost.flops),
        flops_per_token=cost.cost.flops / length,
        pairs=cost.cost.pairs / length,
        loss=loss,
        bits_per_byte=evaluation.get("bits_per_byte"),
        sparsity=run.sparsity,
        strict=evaluation["causality"] == "strict",
        seconds=run.tokens / pace,
        tokens_per_second=pace,
        peak_memory=memory,
        state_bytes={str(n): size for n, size in states.items()},
        parent=None if run.parent is None else run.parent.name,
        group=run.group,
        scoring=evaluation["scoring"],
        command=command,
        environment=json.loads((folder / "environment.json").read_text()),
    )


def pace_and_memory(folder: Path, begun: int) -> tuple[float, int]:
    """Tokens per second of the training steps in `folder` after the first `begun` tokens, and the most bytes held.

    Each row of metrics has the pace of the tokens since the row before; an event at its end has the memory.
    """
    steps = [{"tokens": begun}, *(row for row in read_metrics(folder) if row.get("tokens_per_second"))]
    seconds = sum((row["tokens"] - before["tokens"]) / row["tokens_per_second"] for before, row in pairwise(steps))
    peaks = [event["peak_memory"] for event in read_rows(folder / "events.jsonl") if "peak_memory" in event]
    return (steps[-1]["tokens"] - begun) / seconds if seconds else 0.0, max(peaks, default=0)
