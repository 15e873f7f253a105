"""Training on continuous streams: what the mixers remember goes on from a segment to the next, without gradient.

(Truncated back-propagation through time; for windows and full attention the memory of Dai et al., "Transformer-XL:
Attentive Language Models Beyond a Fixed-Length Context", 2019, arXiv 1901.02860.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attention.snapshot import restore, take_snapshot
from lmtrain.model import DecoderLM, ModelState


class Streams:
    """The states of the rows of a step, one for each micro-batch; empty where streams begin.

    micro_batch: rows of one; carry: how many tokens a key lives for at most, besides its mixer's own rule.
    """

    def __init__(self, model: DecoderLM, micro_batch: int, carry: int) -> None:
        self.model, self.micro_batch, self.carry = model, micro_batch, carry
        self._states: dict[int, ModelState] = {}

    def at(self, micro: int, begins: bool) -> ModelState:
        """The state that micro-batch `micro` of this step goes on from; a new one if its rows begin here."""
        if begins or micro not in self._states:
            self._states[micro] = self._new()
        return self._states[micro]

    def drop(self) -> None:
        """Forget everything: what was read may not be finite."""
        self._states = {}

    @property
    def bytes(self) -> int:
        """Bytes of what is remembered, over all rows."""
        return sum(state.bytes for state in self._states.values())

    def snapshot(self) -> tuple[Any, dict[str, Tensor]]:
        """(JSON, tensors by name) of all states, for a checkpoint."""
        return take_snapshot({str(micro): state for micro, state in self._states.items()})

    def load(self, kept: Any, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `snapshot` returned; ValueError if it belongs to another model or batch."""
        numbers = [int(micro) for micro in kept["dict"]]
        new = {str(micro): self._new() for micro in numbers}
        states = restore(kept, tensors, new, self.model.embedding.weight.device)
        self._states = {micro: states[str(micro)] for micro in numbers}

    def _new(self) -> ModelState:
        return self.model.init_state(self.micro_batch, limit=self.carry)
