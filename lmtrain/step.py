"""One optimizer step: forward and backward over this rank's micro-batches, and the update."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attention.mixer import Context
from data.loader import Batch
from lmtrain import fault, watch
from lmtrain.config import Config
from lmtrain.model import DecoderLM
from lmtrain.streams import Streams
from parallel.engine import Engine, StepInfo
from parallel.sequence import SequenceShard, even_lengths
from parallel.world import World


@dataclass(frozen=True)
class Step:
    """A step that was made: what the engine says of it, and what was read.

    batches: this rank's, of whole rows; crc: of those of all ranks. mixers: their statistics, if asked for.
    sent: bytes sent to ranks that share the sequences, for each token of this one; None if there are none.
    """

    info: StepInfo
    batches: list[Batch]
    crc: int
    mixers: watch.Mixers
    sent: float | None


class Stepper:
    """Makes the steps of one rank; between them it holds what streams remember (`streams`)."""

    def __init__(
        self,
        config: Config,
        model: DecoderLM,
        engine: Engine,
        device: torch.device,
        world: World,
        *,
        debug: bool,
        at: Callable[[str], None],
    ) -> None:
        """debug, at: as of `lmtrain.train.Training`."""
        self.engine, self.device, self.world = engine, device, world
        self.debug, self.at = debug, at
        self.seed = config.run.seed
        micro_batch = config.micro_batch(world.data_size)
        self.streams = Streams(model, micro_batch, config.carry, world) if config.data.stream else None
        self.shard: SequenceShard | None = None
        if world.sequence > 1:
            self.shard = SequenceShard(world, even_lengths(config.data.seq_len, world.sequence))

    def make(self, number: int, batches: list[Batch], update: Callable[[], StepInfo], watched: bool) -> Step:
        """Step `number`, from 1. update: of the weights, behind the backward passes. watched: ask the mixers."""
        batches = whole = [fault.before_forward(batch) for batch in batches]
        if self.shard is not None:
            batches = [batch.part(self.shard.tokens) for batch in whole]
            self.shard.sent = 0
        scored, crc = self._over_ranks(
            sum(int((batch.labels >= 0).sum()) for batch in batches), sum(batch.crc for batch in batches)
        )
        statistics: dict[Any, Any] | None = {} if watched else None
        for micro, batch in enumerate(batches):
            self.at(f"step {number}, micro-batch {micro + 1} of {len(batches)}")
            last = micro == len(batches) - 1
            self._learn(number, micro, batch, scored, statistics if last else None)
        self.at(f"step {number}, the update")
        fault.before_update(number)
        info = update()
        if info.skipped and self.streams is not None:
            self.streams.drop()
        sent = None if self.shard is None else self.shard.sent / sum(batch.tokens.numel() for batch in batches)
        return Step(info, whole, crc % 2**32, watch.read(statistics or {}), sent)

    def _learn(self, number: int, micro: int, batch: Batch, scored: int, statistics: dict[Any, Any] | None) -> None:
        """Forward and backward of one micro-batch, of a step with `scored` labels in all."""
        ctx = Context(
            positions=_to(batch.positions, self.device),
            document_ends=_to(batch.document_ends, self.device),
            statistics=statistics,
            debug=self.debug,
            shard=self.shard,
        )
        in_step = micro * self.world.data_size + self.world.data_rank  # whoever reads it
        seed = _seed(self.seed, number - 1, in_step, self.world.sequence_rank)
        state = None if self.streams is None else self.streams.at(micro, batch.begins)
        loss = self.engine.forward_loss(batch.tokens, batch.labels, ctx, scored, seed, state)
        self.engine.backward(fault.before_backward(number, batch, loss))

    def _over_ranks(self, *numbers: int) -> list[int]:
        """The sum of each number over the ranks."""
        told = torch.tensor(numbers, device=self.world.device)
        self.world.sum_([told])
        return told.tolist()


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _seed(*where: int) -> int:
    """Dropout's seed, from (seed, step, micro-batch in the step, slice of its tokens) alone: no random state has to
    survive a restart, and a micro-batch has the same dropout whichever rank reads it."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, where)).encode(), digest_size=8).digest()) >> 1
