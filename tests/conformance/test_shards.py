"""Point 12: ranks that share a sequence compute what one process does, gradients and what is learnt online included.

Each mixer runs once on 2 and once on 4 ranks, through all cases of its oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.mixer import MIXERS, Mixer, build
from parallel.sequence import SequenceShard
from parallel.world import ALONE, World
from tests.conformance.oracle import Case, Subject, load, missing
from tests.conformance.sequences import Packing, Tokens, largest_difference
from tests.processes import run_ranks

LENGTHS = {2: [19, 26], 4: [13, 1, 21, 10]}
"""Tokens of each rank: no multiple of anything, and a single one."""

LENGTH = 45
ROWS = Packing([[5, 12, 28], [45]])
"""Documents across shards: a short one, one that ends in the single token's neighbour, and one through all ranks."""

CUT_AT_A_SHARD = Packing([[13, 1, 31], [19, 26]])
"""Documents that begin with a shard, on 4 ranks or on 2, and one that is a shard of a single token."""

FIELDS = [
    (ROWS, ()),
    (ROWS, ("positions", "document_ends")),
    (CUT_AT_A_SHARD, ("positions",)),
    (CUT_AT_A_SHARD, ("document_ends",)),
]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class Setting:
    """A mixer, what its context tells of documents, and the precision."""

    subject: Subject
    packing: Packing
    fields: tuple[str, ...]
    dtype: torch.dtype = torch.float64


@dataclass
class Result:
    """Of one process, about its tokens: y, gradients by `vectors` [3, B, T, d]; its part of the parameters' gradients
    and of the losses; the buffers behind `after_step`, which adds up over the ranks."""

    y: Tensor
    inputs: Tensor
    parameters: dict[str, Tensor]
    losses: dict[str, Tensor]
    buffers: dict[str, Tensor]


def settings_of(kind: str) -> list[Setting]:
    """All cases, unpacked and packed; of the first one also with less told, and in float32."""
    subjects = [Subject(kind, case) for case in load(kind).cases().values()]
    if kind == "mosa":
        subjects.append(Subject(kind, Case({"heads": 3, "keep": 5, "head_dim": 4, "selection": "paper"}, dim=8)))
    found = []
    for number, subject in enumerate(subjects):
        packs = subject.case.settings.get("selection") != "paper"
        for packing, fields in FIELDS[: (4 if number == 0 else 2) if packs else 1]:
            found.append(Setting(subject, packing, fields))
    return [*found, *(Setting(subjects[0], *told, torch.float32) for told in FIELDS[:2])]


def run(setting: Setting, world: World, shard: SequenceShard | None) -> Result:
    """Forward, backward of a random linear function of y and of the losses, and the step behind it."""
    here = slice(0, LENGTH) if shard is None else shard.tokens
    case, dtype = setting.subject.case, setting.dtype
    tokens = Tokens.random(2, LENGTH, case.dim).to(dtype).part(here.start, here.stop)
    tokens.vectors.requires_grad_()
    weights = torch.randn(2, LENGTH, case.dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mixer = setting.subject.mixer(dtype)

    told = setting.packing.part(here.start, here.stop, *setting.fields)
    y, losses = mixer(tokens.x, tokens.ctx(training=True, shard=shard, **told))
    share = (here.stop - here.start) / LENGTH
    losses = {name: share * loss for name, loss in losses.items()}
    ((y * weights[:, here].to(dtype)).sum() + 10 * sum(losses.values())).backward()

    world.sum_(mixer.pending())
    mixer.after_step()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in mixer.named_parameters()}
    losses = {name: loss.detach() for name, loss in losses.items()}
    assert tokens.vectors.grad is not None
    return Result(y.detach(), tokens.vectors.grad, gradients, losses, dict(mixer.named_buffers()))


def _run_all(world: World, settings: list[Setting]) -> list[Result]:
    return [run(setting, world, SequenceShard(world, LENGTHS[world.size])) for setting in settings]


@cache
def alone(kind: str) -> list[Result]:
    """Each setting in one process."""
    return [run(setting, ALONE, None) for setting in settings_of(kind)]


def differences(parts: list[Result], whole: Result) -> dict[str, float]:
    """By name, relative to the largest number where that is above 1."""
    pairs = {
        "y": (torch.cat([part.y for part in parts], 1), whole.y),
        "gradient of the inputs": (torch.cat([part.inputs for part in parts], 2), whole.inputs),
    }
    for name, gradient in whole.parameters.items():
        pairs[name] = torch.stack([part.parameters[name] for part in parts]).sum(0), gradient
    for name, loss in whole.losses.items():
        pairs[f"loss {name}"] = torch.stack([part.losses[name] for part in parts]).sum(0), loss
    for rank, part in enumerate(parts):
        pairs |= {f"{name} of rank {rank}": (part.buffers[name], buffer) for name, buffer in whole.buffers.items()}
    return {
        name: largest_difference(ours, theirs) / max(1.0, float(theirs.abs().max()))
        for name, (ours, theirs) in pairs.items()
    }


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_ranks_that_share_a_sequence_equal_one_process(kind: str, ranks: int) -> None:
    assert missing(kind) is None, missing(kind)
    settings = settings_of(kind)
    results = run_ranks(ranks, _run_all, settings, sequence=ranks)
    for setting, whole, *parts in zip(settings, alone(kind), *results, strict=True):
        assert whole.inputs.abs().max() > 0
        worst = max(differences(parts, whole).items(), key=lambda item: item[1])
        assert worst[1] < TOLERANCE[setting.dtype], (setting, worst)


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_every_mixer_says_what_crosses(kind: str) -> None:
    assert build(kind, 48).sequence_parallel


class Single:
    """A sequence of one rank."""

    rank = 0

    def __init__(self, length: int) -> None:
        self.lengths = (length,)

    def exchange(self, rows: Tensor, send: Any, receive: Any) -> Tensor:
        assert [len(index) for index in send] == list(receive)
        return rows[send[0]]


def test_one_rank_is_one_process(subject: Subject) -> None:
    mixer, tokens = subject.mixer(), Tokens.random(2, LENGTH, subject.case.dim)
    told = ROWS.part(0, LENGTH, "positions", "document_ends")
    y = tokens.run(mixer, **told)
    assert largest_difference(tokens.run(mixer, shard=Single(LENGTH), **told), y) < 1e-12


def test_a_state_and_a_shard_are_refused_together(typical: Subject) -> None:
    mixer, tokens = typical.mixer(), Tokens.random(2, 5, typical.case.dim)
    with pytest.raises(ValueError, match=r"a state .* a sequence shard .* not both"):
        tokens.run(mixer, mixer.init_state(2), shard=Single(5))


def test_a_shard_of_another_length_is_refused(typical: Subject) -> None:
    mixer, tokens = typical.mixer(), Tokens.random(2, 5, typical.case.dim)
    with pytest.raises(ValueError, match=r"ctx\.shard: rank 0 has 6 tokens, got 5"):
        tokens.run(mixer, shard=Single(6))


def test_a_mixer_that_takes_no_shard_says_so() -> None:
    mixer: Mixer = build("routing", 8, heads=2, selection="paper")
    tokens = Tokens.random(2, 5, 8).to(torch.float32)
    assert mixer.sequence_parallel is None
    with pytest.raises(ValueError, match=r"cannot share a sequence among ranks: set parallel\.sequence 1"):
        tokens.run(mixer, shard=Single(5))
