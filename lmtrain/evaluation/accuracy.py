"""Accuracy on a synthetic task: how many of the scored labels a model says exactly.

E examples of T tokens are scored whole: the likeliest token where a label stands must be that label. A model that
selects ahead has seen what follows the question, so its answers count from the prefix up to the question alone.

Several ranks share the batches, and each then knows what became of every example, in the order of one process. All make
equally many forward passes; whoever has no batch left repeats one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import UNSCORED
from data.tasks import TaskDataset
from data.tasks.task import Examples
from lmtrain.evaluation.scoring import Autocast, ShouldStop, evaluating, poll
from lmtrain.model import DecoderLM
from parallel.world import ALONE, World

PREFIXES = 1024
"""At most so many questions of a model that selects ahead are asked, unless another number is given."""


@dataclass(frozen=True)
class Accuracy:
    """What became of the examples of a task. nats: sum of -ln p over the labels.

    standard_error: of the accuracy, NaN for a single example. one_pass: of a model that selects ahead, the accuracy
    that one pass over the whole examples claims.
    """

    dataset: TaskDataset
    causality: str
    nats: float
    scored_tokens: int
    right_tokens: int
    examples: int
    right_examples: int
    standard_error: float
    one_pass: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of the labels that were said exactly, each with the right answers before it in its context."""
        return self.right_tokens / self.scored_tokens

    @property
    def example_accuracy(self) -> float:
        """Share of the examples of which every label was said: of passkeys, what greedy generation finds."""
        return self.right_examples / self.examples

    @property
    def loss(self) -> float:
        """Nats per label."""
        return self.nats / self.scored_tokens

    @property
    def scoring(self) -> str:
        """How the answers were got."""
        return "one-pass" if self.one_pass is None else "prefix-wise"

    def row(self) -> dict[str, Any]:
        """The numbers, as a row of metrics.jsonl and the JSON of `eval` both have them; null for what is not finite."""
        row: dict[str, Any] = {
            "split": self.dataset.split,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "bits_per_byte": None,
            "accuracy": self.accuracy,
            "accuracy_standard_error": None if math.isnan(self.standard_error) else self.standard_error,
            "example_accuracy": self.example_accuracy,
            "scored_tokens": self.scored_tokens,
            "examples": self.examples,
            "context": self.dataset.length,
            "stride": None,
            "scoring": self.scoring,
            "causality": self.causality,
        }
        return row if self.one_pass is None else row | {"one_pass_accuracy": self.one_pass}


class Part(NamedTuple):
    """Tokens [rows, 0..stop-1] of some examples as one forward pass; of their labels all count, or only the last."""

    rows: np.ndarray
    stop: int
    last_only: bool


def evaluate_task(
    model: DecoderLM,
    dataset: TaskDataset,
    *,
    examples: int,
    prefixes: int | None = None,
    batch_tokens: int = 16384,
    autocast: Autocast = nullcontext,
    should_stop: ShouldStop | None = None,
    world: World = ALONE,
) -> Accuracy:
    """Asks the model the first so many examples of the split.

    prefixes: of a model that selects ahead, how many questions are asked at most (`PREFIXES`): it may see fewer
    examples, but one at least. The rest is as in `lmtrain.evaluation.evaluate`. ValueError: see `check_length`.
    """
    check_length(model, dataset)
    strict = model.causality == "strict"
    if not strict:
        asked = int((dataset.examples(0, 1).labels != UNSCORED).sum())
        examples = min(examples, max(1, (prefixes or PREFIXES) // asked))
    texts = dataset.examples(0, examples)
    with evaluating(model), autocast():
        told = _outcomes(model, texts, list(_whole(texts, batch_tokens)), should_stop, world)
        claimed = None if strict else float(told[:, 1].sum() / told[:, 2].sum())
        if not strict:
            told = _outcomes(model, texts, list(_prefixes(texts, batch_tokens)), should_stop, world)
    nats, right, scored = told.sum(0).tolist()
    shares = told[:, 1] / told[:, 2]
    return Accuracy(
        dataset,
        model.causality,
        nats=nats,
        scored_tokens=int(scored),
        right_tokens=int(right),
        examples=examples,
        right_examples=int((told[:, 1] == told[:, 2]).sum()),
        standard_error=float(shares.std(ddof=1) / math.sqrt(examples)) if examples > 1 else math.nan,
        one_pass=claimed,
    )


def check_length(model: DecoderLM, dataset: TaskDataset) -> None:
    """ValueError if the examples are longer than the model's table of positions."""
    if model.positions is not None and dataset.length > model.positions.num_embeddings:
        raise ValueError(
            f"{dataset.corpus}: {dataset.length} tokens are more than the {model.positions.num_embeddings} "
            "of model.learned_positions"
        )


def _whole(texts: Examples, batch_tokens: int) -> Iterator[Part]:
    """All examples, whole."""
    number, length = texts.tokens.shape
    size = max(1, batch_tokens // length)
    for first in range(0, number, size):
        yield Part(np.arange(first, min(first + size, number)), length, last_only=False)


def _prefixes(texts: Examples, batch_tokens: int) -> Iterator[Part]:
    """For each label the tokens up to where it stands; equally long ones together, for padding would be seen."""
    rows, places = np.nonzero(texts.labels != UNSCORED)
    for place in np.unique(places).tolist():
        asked = rows[places == place]
        size = max(1, batch_tokens // (place + 1))
        for first in range(0, len(asked), size):
            yield Part(asked[first : first + size], place + 1, last_only=True)


def _outcomes(
    model: DecoderLM, texts: Examples, parts: list[Part], should_stop: ShouldStop | None, world: World
) -> np.ndarray:
    """float64 [E, 3]: of each example the nats, and the labels that were said and that there are."""
    told = torch.zeros((len(texts.tokens), 3), dtype=torch.float64, device=world.device)
    for first in range(0, len(parts), world.size):
        poll(should_stop)
        mine = first + world.rank
        part = parts[min(mine, len(parts) - 1)]
        outcome = _ask(model, texts, part)
        if mine < len(parts):  # else it repeats what another rank tells
            told.index_add_(0, torch.from_numpy(part.rows).to(told.device), outcome.to(told.device))
    world.sum_([told])
    return told.cpu().numpy()


def _ask(model: DecoderLM, texts: Examples, part: Part) -> Tensor:
    """float64 [rows, 3], of one forward pass, as `_outcomes` gives them."""
    device = model.head_weight.device
    tokens, labels = (torch.from_numpy(of[part.rows, : part.stop]).to(device) for of in texts)
    if part.last_only:
        labels[:, :-1] = UNSCORED
    scored = labels != UNSCORED
    answers, right = F.linear(model.hidden(tokens).y[scored], model.head_weight).float(), labels[scored]
    of_label = torch.stack(
        [
            F.cross_entropy(answers, right, reduction="none").double(),
            (answers.argmax(-1) == right).double(),
            torch.ones(len(right), dtype=torch.float64, device=device),
        ],
        dim=1,
    )
    return of_label.new_zeros(len(tokens), 3).index_add_(0, scored.nonzero()[:, 0], of_label)
