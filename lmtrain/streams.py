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
from parallel.world import ALONE, World


class Streams:
    """The states of the rows of a step, one for each micro-batch; empty where streams begin.

    micro_batch: rows of one; carry: how many tokens a key lives for at most, besides its mixer's own rule. world: each
    data rank has the states of its own rows; a checkpoint has all, by the number of the micro-batch in the step.
    """

    def __init__(self, model: DecoderLM, micro_batch: int, carry: int, world: World = ALONE) -> None:
        self.model, self.micro_batch, self.carry, self.world = model, micro_batch, carry, world
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
        """Bytes of what is remembered, over all rows of this rank."""
        return sum(state.bytes for state in self._states.values())

    def snapshot(self) -> tuple[Any, dict[str, Tensor]]:
        """(JSON, tensors by name) of the states of all rows, for a checkpoint. All ranks call this; the first one gets
        the whole."""
        ranks, own = self.world.data_size, self.world.data_rank
        kept, tensors = take_snapshot({str(micro * ranks + own): state for micro, state in self._states.items()})
        rows = {number: state for told in self.world.gather(kept) for number, state in told["dict"].items()}
        return {"dict": rows}, self.world.to_first(tensors)

    def load(self, kept: Any, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `snapshot` returned, of the own rows; ValueError if it belongs to another model or batch."""
        ranks, own = self.world.data_size, self.world.data_rank
        if not isinstance(kept, dict) or not isinstance(kept.get("dict"), dict):
            raise ValueError("its streams are not those of a batch")
        numbers = [int(number) for number in kept["dict"] if int(number) % ranks == own]
        mine = {"dict": {str(number): kept["dict"][str(number)] for number in numbers}}
        new = {str(number): self._new() for number in numbers}
        states = restore(mine, tensors, new, self.model.embedding.weight.device)
        self._states = {number // ranks: states[str(number)] for number in numbers}

    def _new(self) -> ModelState:
        return self.model.init_state(self.micro_batch, limit=self.carry)
