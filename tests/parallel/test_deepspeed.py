"""ZeRO at every stage against plain torch in one process: losses, norms, weights, moments, and what they save.

Few processes, each doing much: importing DeepSpeed takes a second in each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmtrain.config import ModelConfig, OptimizerConfig
from lmtrain.model import DecoderLM
from lmtrain.optimizer import build_optimizer, torch_adamw
from parallel.deepspeed import DeepSpeedEngine
from parallel.engine import StepInfo, TorchEngine
from parallel.world import ALONE, World
from tests.processes import run_ranks

CPU = torch.device("cpu")
SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # else the small weights are kept everywhere
STAGES = (1, 2, 3)
STEPS, ROWS, LENGTH, VOCABULARY = 20, 4, 16, 11
MIXERS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "heads": 3, "head_dim": 4},
    "vq": {"kind": "vq", "heads": 3, "position_features": 4, "block": 4, "codes": 4},
    "mega": {"kind": "mega", "ema_dim": 3, "chunk": 8},
}
State = dict[str, dict[str, Tensor]]


def make_model(**settings: Any) -> DecoderLM:
    """Odd sizes, so that no weight is a multiple of the ranks; the head is the embedding."""
    torch.manual_seed(0)
    wanted = {"dim": 15, "layers": 3, "ffn_dim": 33, "vocab_size": VOCABULARY, "tied": True}
    wanted |= {"mixers": MIXERS, "pattern": "dense vq mega"}
    return DecoderLM(ModelConfig(**{**wanted, **settings}))


@contextmanager
def engine_of(
    kind: int | str, world: World = ALONE, model: nn.Module | None = None, **settings: Any
) -> Iterator[DeepSpeedEngine | TorchEngine]:
    """`torch`, or the stage of ZeRO."""
    model = make_model() if model is None else model
    settings = {"world": world, "device": CPU, "clip": 0.5, **settings}
    made: DeepSpeedEngine | TorchEngine
    if isinstance(kind, str):
        made = TorchEngine(model, build_optimizer(model, OptimizerConfig()), **settings)
    else:
        optimizer = settings.pop("optimizer", None) or torch_adamw(model, OptimizerConfig())
        made = DeepSpeedEngine(model, optimizer, stage=kind, **{"extra": SPREAD, **settings})
    with closing(made):
        yield made


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Rows [ROWS, LENGTH] and their labels: as many scored as chance has it, and none at all in row 1."""
    generator = torch.Generator().manual_seed(step % 2)  # few, so that they can be learnt
    text = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    labels = text[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[1] = -100
    labels[3, 2:] = -100
    return text[:, :-1], labels


def one_step(engine: Any, step: int, lr: float = 1e-3, spoil: int | None = None) -> StepInfo:
    """Rank r of W takes the rows r, r + W, .., each a micro-batch; `spoil`: the rank whose last loss becomes NaN."""
    tokens, labels = batch(step)
    scored = int((labels >= 0).sum())
    for row in range(engine.world.rank, ROWS, engine.world.size):
        part = slice(row, row + 1)
        loss = engine.forward_loss(tokens[part], labels[part], None, scored, seed=row)
        last = row + engine.world.size >= ROWS
        engine.backward(loss * float("nan") if last and spoil == engine.world.rank else loss)
    return engine.step(lr)


def train(engine: Any, first: int = 0, last: int = STEPS, **how: Any) -> list[StepInfo]:
    return [one_step(engine, step, **how) for step in range(first, last)]


def check_infos(infos: list[StepInfo], expected: list[StepInfo], tolerance: float = 1e-6) -> None:
    for info, other in zip(infos, expected, strict=True):
        assert info.loss == pytest.approx(other.loss, abs=tolerance)
        assert info.auxiliary == pytest.approx(other.auxiliary, abs=tolerance)
        assert info.grad_norm == pytest.approx(other.grad_norm, rel=100 * tolerance)
        assert (info.lr, info.skipped) == (other.lr, other.skipped)


def check_state(state: State, expected: State, tolerance: float) -> None:
    for group in ("model", "optimizer"):
        assert state[group].keys() == expected[group].keys()
        for name, tensor in state[group].items():
            torch.testing.assert_close(tensor, expected[group][name], atol=tolerance, rtol=0, msg=name)


def copied(engine: Any) -> State:
    return {group: {name: t.clone() for name, t in members.items()} for group, members in engine.state().items()}


def same_bits(one: State, other: State) -> list[str]:
    """What differs."""
    return [
        f"{g}.{name}" for g, members in one.items() for name, t in members.items() if not torch.equal(t, other[g][name])
    ]


@dataclasses.dataclass
class Seen:
    """What one stage did on one rank."""

    infos: list[StepInfo]
    state: State
    spoilt: StepInfo
    changed_by_spoilt: list[str]
    pending_after_spoilt: float
    again: list[StepInfo]
    from_torch: list[StepInfo]
    from_half: list[StepInfo]
    half_differs: list[str]


def stage_on_ranks(world: World, stage: int, of_torch: State) -> Seen:
    """All that is asked of a stage: training whole, from its own half-way state, and from torch's; a spoilt step."""
    with engine_of(stage, world) as engine:
        infos = train(engine, last=STEPS // 2)
        half = copied(engine)
        infos += train(engine, first=STEPS // 2)
        whole = copied(engine)
        spoilt = one_step(engine, 0, spoil=world.size - 1)
        changed = same_bits(whole, copied(engine))
        pending = sum(float(x.abs().sum()) for x in engine.model.pending())  # type: ignore[operator]
        again = train(engine, last=2)
    shared = [half] if world.size == 1 else broadcast(half)
    with engine_of(stage, world) as engine:
        one_step(engine, 5)  # whatever there was is replaced
        engine.load_state(shared[0])
        from_half = train(engine, first=STEPS // 2)
        differs = same_bits(whole, copied(engine))
        engine.load_state(of_torch)
        from_torch = train(engine, first=STEPS // 2)
    return Seen(infos, whole, spoilt, changed, pending, again, from_torch, from_half, differs)


def broadcast(state: State) -> list[State]:
    box = [state]
    torch.distributed.broadcast_object_list(box)
    return box


def on_ranks(world: World, of_torch: State, stages: tuple[int, ...]) -> dict[int, Seen]:
    return {stage: stage_on_ranks(world, stage, of_torch) for stage in stages}


@dataclasses.dataclass
class Reference:
    """Torch in one process: all steps, the state half-way and at the end."""

    infos: list[StepInfo]
    half: State
    whole: State
    again: list[StepInfo]


@pytest.fixture(scope="module")
def reference() -> Reference:
    with engine_of("torch") as engine:
        infos = train(engine, last=STEPS // 2)
        half = copied(engine)
        infos += train(engine, first=STEPS // 2)
        whole = copied(engine)
        assert infos[-1].loss < 0.8 * infos[0].loss
        assert min(info.grad_norm for info in infos) > 0.5, "every step must be clipped"
        return Reference(infos, half, whole, train(engine, last=2))


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_stage_is_plain_torch(reference: Reference, ranks: int) -> None:
    """The same losses, norms, weights and moments, whole and continued from any state; the same bits from its own."""
    outcomes = run_ranks(ranks, on_ranks, reference.half, STAGES)
    for stage in STAGES:
        seen: Seen = outcomes[0][stage]
        check_infos(seen.infos, reference.infos)
        check_state(seen.state, reference.whole, 1e-5)
        check_infos(seen.from_torch, reference.infos[STEPS // 2 :])
        assert seen.from_half == seen.infos[STEPS // 2 :], f"stage {stage}"
        assert seen.half_differs == [], f"stage {stage}"
        assert seen.spoilt.skipped
        assert seen.changed_by_spoilt == [], f"stage {stage}"
        assert seen.pending_after_spoilt == 0
        check_infos(seen.again, reference.again)
        for other in outcomes[1:]:
            assert other[stage].infos == seen.infos, "the ranks tell the same"
            assert other[stage].state == {"model": {}, "optimizer": {}}, "the first rank alone holds the whole"
        with engine_of("torch") as engine:
            engine.load_state(seen.state)
            check_infos(train(engine, last=2), reference.again)
