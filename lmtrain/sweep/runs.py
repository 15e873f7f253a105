"""One run of a sweep before it is started: its configuration and what it costs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lmtrain.config import Config
from lmtrain.sweep.cost import ModelCost
from lmtrain.sweep.match import Solved, training_flops
from lmtrain.sweep.spec import Label

BYTES_OF_CHECKPOINT = {"adamw": 12, "muon": 8}
"""For each parameter: the weight and its moments, float32."""


@dataclass(frozen=True)
class Run:
    """One run. words: `lmtrain train` takes them, `run.dir` aside; parent: the run whose last checkpoint it
    begins with; is_trunk: it only serves its forks, and has no result."""

    name: str
    hash: str
    axes: dict[str, Label]
    config: Config
    words: tuple[str, ...]
    cost: ModelCost
    solved: Solved | None = None
    parent: Run | None = None
    is_trunk: bool = False

    @property
    def group(self) -> str:
        """The name of the first part of its trunk, or its own."""
        return self.name if self.parent is None else self.parent.group

    @property
    def begins(self) -> int:
        """Steps that its parent has taken."""
        return 0 if self.parent is None else self.parent.config.train.steps

    @property
    def folder(self) -> str:
        """Its name in the folder of the sweep."""
        return f"{self.name}-{self.hash}"

    @property
    def parameters(self) -> int:
        """N, without embedding, positions and head."""
        return self.cost.cost.parameters - self.cost.embedding

    @property
    def tokens(self) -> int:
        """D, those of its ancestors included."""
        return self.config.train.steps * self.config.train.batch_tokens

    @property
    def flops(self) -> float:
        """Of training all D tokens."""
        return training_flops(self.config, self.cost.cost.flops)

    @property
    def own_flops(self) -> float:
        """Of what the run trains itself."""
        return self.flops * (1 - self.begins / self.config.train.steps)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, about."""
        return self.cost.cost.parameters * BYTES_OF_CHECKPOINT[self.config.optimizer.kind]

    @property
    def disk_bytes(self) -> int:
        """Of all that it keeps, about."""
        kept = min(self.config.checkpoint.keep, -(-self.config.train.steps // self.config.checkpoint.every))
        return self.checkpoint_bytes * kept

    @property
    def sparsity(self) -> float | None:
        """As of its configuration."""
        return sparsity(self.config)

    def per_token(self, quantity: float) -> float:
        """Of one sequence, per token."""
        return quantity / self.config.data.seq_len


def sparsity(config: Config) -> float | None:
    """seq_len / keep, if the mixers agree on how many tokens are kept."""
    used = set(re.findall(r"\w+", config.model.pattern))
    mixers = [settings for name, settings in config.model.mixers.items() if name in used]
    kept = {settings["keep"] for settings in mixers if "keep" in settings}
    return config.data.seq_len / kept.pop() if len(kept) == 1 else None
