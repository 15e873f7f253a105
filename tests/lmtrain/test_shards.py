"""Whole models on ranks that share sequences: the same losses, gradients and weights as one process."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.mixer import Context
from data.loader import Batch
from lmtrain.config import ModelConfig, OptimizerConfig
from lmtrain.model import DecoderLM
from lmtrain.optimizer import build_optimizer
from parallel.engine import TorchEngine
from parallel.sequence import SequenceShard, even_lengths
from parallel.world import ALONE, World
from tests.conformance.sequences import Packing, largest_difference
from tests.processes import run_ranks

MIXERS: dict[str, dict[str, Any]] = {
    "near": {"kind": "local", "heads": 2, "window": 5},
    "far": {"kind": "mosa", "heads": 3, "head_dim": 8, "keep": 6},
    "vq": {"kind": "vq", "heads": 2, "codes": 4, "block": 4},
    "moh": {"kind": "moh", "heads": 4, "shared_heads": 1, "active_heads": 2},
    "first": {"kind": "inattention", "heads": 2},
    "mega": {"kind": "mega", "chunk": 8, "ema_dim": 2},
}
STEPS, ROWS, LENGTH, VOCABULARY = 5, 4, 30, 11
DOCUMENTS = Packing([[30], [7, 23], [15, 1, 14], [8, 8, 14]])


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A pattern, and what is special about its model, its batches or its training."""

    pattern: str
    packed: bool = False
    checkpointing: bool = False
    learned: bool = False

    def model(self) -> DecoderLM:
        torch.manual_seed(0)
        config = ModelConfig(
            dim=16,
            layers=2,
            ffn_dim=32,
            vocab_size=VOCABULARY,
            mixers=MIXERS,
            pattern=self.pattern,
            learned_positions=LENGTH if self.learned else None,
        )
        model = DecoderLM(config).double()
        model.activation_checkpointing = self.checkpointing
        return model

    def batch(self, step: int, row: int) -> Batch:
        """Two rows; packed, the last token of a document is not scored, and in row 1 only a few are."""
        generator = torch.Generator().manual_seed(step % 2)
        text = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        labels, positions, ends = text[:, 1:].clone(), None, None
        if self.packed:
            positions, ends = DOCUMENTS.positions, DOCUMENTS.document_ends
            labels[torch.arange(1, LENGTH + 1) >= ends] = -100
            labels[1, 4:] = -100
        rows = slice(row, row + 2)
        told = (None if x is None else x[rows] for x in (positions, ends))
        return Batch(text[rows, :-1], labels[rows], *told, samples=(row,), begins=True, crc=1)


EXPERIMENTS = [
    Experiment("near+far"),
    Experiment("near+far", packed=True, checkpointing=True),
    Experiment("near+far vq", packed=True, learned=True),
    Experiment("moh first", packed=True, checkpointing=True),
    Experiment("vq mega", checkpointing=True),
]


def train(world: World, experiment: Experiment) -> list[dict[str, Tensor]]:
    """Of each step losses and gradients, summed over the ranks; at the end also the weights."""
    model = experiment.model()
    optimizer = build_optimizer(model, OptimizerConfig())
    engine = TorchEngine(model, optimizer, device=torch.device("cpu"), clip=1.0, world=world)
    shard = SequenceShard(world, even_lengths(LENGTH, world.sequence)) if world.sequence > 1 else None
    told = []
    for step in range(STEPS):
        rows = range(2 * world.data_rank, ROWS, 2 * world.data_size)
        scored = sum(int((experiment.batch(step, row).labels >= 0).sum()) for row in range(0, ROWS, 2))
        for row in rows:
            batch = experiment.batch(step, row)
            batch = batch if shard is None else batch.part(shard.tokens)
            ctx = Context(positions=batch.positions, document_ends=batch.document_ends, shard=shard)
            engine.backward(engine.forward_loss(batch.tokens, batch.labels, ctx, scored, seed=0))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        world.sum_(list(gradients.values()))
        info = engine.step(1e-2)
        numbers = torch.tensor([info.loss, info.auxiliary, info.grad_norm], dtype=torch.float64)
        told.append({"losses and norm": numbers, **gradients})
    return [*told, {name: tensor.clone() for name, tensor in model.state_dict().items()}]


@cache
def alone(experiment: Experiment) -> list[dict[str, Tensor]]:
    """In one process."""
    return train(ALONE, experiment)


def _train_all(world: World) -> list[list[dict[str, Tensor]]]:
    return [train(world, experiment) for experiment in EXPERIMENTS]


@pytest.mark.parametrize(("ranks", "sequence"), [(2, 2), (4, 4), (4, 2)])
def test_training_on_shards_is_training_in_one_process(ranks: int, sequence: int) -> None:
    expected = [alone(experiment) for experiment in EXPERIMENTS]
    for found in run_ranks(ranks, _train_all, sequence=sequence):
        for experiment, ours, theirs in zip(EXPERIMENTS, found, expected, strict=True):
            for step, (our_step, their_step) in enumerate(zip(ours, theirs, strict=True)):
                assert our_step.keys() == their_step.keys()
                for name, tensor in their_step.items():
                    assert largest_difference(our_step[name], tensor) < 1e-9, (experiment, step, name)


def test_experiments_learn_and_have_auxiliary_losses() -> None:
    """So that the comparison above compares something."""
    steps = alone(EXPERIMENTS[2])
    assert steps[2]["losses and norm"][0] < steps[0]["losses and norm"][0]
    assert steps[0]["losses and norm"][1] > 0


def test_parts_of_a_batch() -> None:
    batch = EXPERIMENTS[1].batch(0, 2)
    parts = [batch.part(slice(0, 8)), batch.part(slice(8, 30))]
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(batch, name))
    assert parts[1].document_ends is not None
    assert parts[1].document_ends[0, [0, 7, 8]].tolist() == [7, 8, 22]
    assert parts[0].document_ends is not None
    assert parts[0].document_ends[0, 0] == 15, "beyond the last token of the part"
    assert [part.crc for part in parts] == [1, 0]
    assert EXPERIMENTS[0].batch(0, 0).part(slice(3, 5)).positions is None
