"""Examples of a task without end, or held out; and the batches that train on them."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.disk import sha256_json
from data.loader import Batch, Batches
from data.tasks.draws import SPLITS, Draws, example_keys
from data.tasks.task import Examples, Task
from data.tokenizer import Tokenizer

HELD_OUT_SEED = 0
"""Of the splits that no model trains on: they are the same in all runs, whatever the run's seed."""


@dataclass(frozen=True)
class TaskDataset:
    """One split of a task at one length: example i is a pure function of (task, seed, split, length, i).

    ValueError for a split that tasks do not have, and for a length that the task's settings do not fit into.
    """

    task: Task
    split: str
    length: int
    seed: int = HELD_OUT_SEED

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"corpus {self.task.name} has no split {self.split!r}; it has {', '.join(SPLITS)}")
        if problems := self.task.problems(self.length):
            raise ValueError(f"{self.corpus}: " + "; ".join(message for _, message in problems))

    def examples(self, first: int, count: int) -> Examples:
        """The examples first..first+count-1."""
        return self.at(np.arange(first, first + count))

    def at(self, indices: np.ndarray) -> Examples:
        """The examples of these indices [S]."""
        return self.task.examples(Draws(example_keys(self.seed, self.split, indices)), self.length)

    @property
    def corpus(self) -> str:
        """What a result must be called."""
        return self.task.title(self.length)

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the task."""
        return self.task.tokenizer

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the task."""
        return dataclasses.asdict(self.task)  # type: ignore[call-overload]

    @property
    def fingerprint(self) -> str:
        """Changes when the examples do, but for the seed of a training split, which is the run's."""
        seed = None if self.split == "train" else self.seed
        return sha256_json([self.task.name, self.settings, self.length, self.split, seed])


class TaskLoader(Batches):
    """Batches of the examples of a task: sample s is example s, so none is read twice."""

    def __init__(self, dataset: TaskDataset, **share: Any) -> None:
        """share: as of `Batches`."""
        super().__init__(**share)
        self.dataset = dataset

    def _batch(self, samples: np.ndarray) -> Batch:
        tokens, labels = self.dataset.at(samples)
        crc = sum(zlib.crc32(row) for row in np.hstack([tokens, labels]).astype("<i4")) % 2**32
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), None, None, tuple(samples.tolist()), True, crc)
