"""ZeRO with every mixer, and one state through engines, stages and numbers of ranks in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention.mixer import MIXERS
from parallel.engine import StepInfo
from parallel.world import ALONE, World
from tests.parallel.batch import batch
from tests.parallel.test_deepspeed import (
    STAGES,
    State,
    broadcast,
    check_infos,
    check_state,
    copied,
    engine_of,
    make_model,
    train,
)
from tests.processes import run_ranks

pytestmark = pytest.mark.slow

SMALL: dict[str, dict[str, Any]] = {
    "combiner": {"span": 4},
    "mega": {"ema_dim": 3, "chunk": 8},
    "moh": {"shared_heads": 1, "active_heads": 2},
    "mosa": {"keep": 8},
    "routing": {"clusters": 2, "window": 8},
    "sparsek": {"keep": 4},
    "vq": {"block": 4, "codes": 4},
}
ONE_HEAD = ("mega",)


def train_with(world: World, kind: int | str, mixer: str) -> tuple[list[StepInfo], State, torch.Tensor]:
    """Three steps of plain descent, then the hidden states of a reading."""
    settings = {"kind": mixer, **({} if mixer in ONE_HEAD else {"heads": 4}), **SMALL.get(mixer, {})}
    model = make_model(dim=16, layers=2, mixers={"it": settings}, pattern="it")
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
    with engine_of(kind, world, model, optimizer=optimizer) as engine:
        infos = train(engine, last=3, lr=0.05)
        read = engine.reading(lambda: model.hidden(batch(3)[0]).y.detach())
        return infos, copied(engine), read


def train_with_each(world: World, stage: int) -> dict[str, Any]:
    return {mixer: train_with(world, stage, mixer) for mixer in sorted(MIXERS)}


@pytest.mark.parametrize("stage", STAGES)
def test_every_mixer(stage: int) -> None:
    outcomes = run_ranks(2, train_with_each, stage, seconds=300)
    for mixer in MIXERS:
        infos, state, read = train_with(ALONE, "torch", mixer)
        for outcome in outcomes:
            check_infos(outcome[mixer][0], infos)
            torch.testing.assert_close(outcome[mixer][2], read, atol=1e-5, rtol=0, msg=mixer)
        for name, tensor in outcomes[0][mixer][1]["model"].items():
            torch.testing.assert_close(tensor, state["model"][name], atol=1e-6, rtol=0, msg=f"{mixer}: {name}")


def leg(world: World, kind: int | str, state: State, first: int, last: int) -> tuple[list[StepInfo], State]:
    """A few steps from a state, and the state behind them."""
    with engine_of(kind, world) as engine:
        engine.load_state(state)
        infos = train(engine, first=first, last=last)
        kept = copied(engine)
        return infos, broadcast(kept)[0] if world.size > 1 else kept


def test_a_relay() -> None:
    """torch - ZeRO 3 on 4 ranks - 1 on 2 - torch on 2 - 2 on 1 - 3 on 2 - 2 on 4 - torch: as torch all the way."""
    with engine_of("torch") as engine:
        expected = train(engine, last=2)
        state = copied(engine)
        expected += train(engine, first=2, last=16)
        whole = copied(engine)
    runners: list[tuple[int, int | str]] = [(4, 3), (2, 1), (2, "torch"), (1, 2), (2, 3), (4, 2), (1, "torch")]
    infos = expected[:2]
    for number, (ranks, kind) in enumerate(runners):
        told, state = run_ranks(ranks, leg, kind, state, 2 * number + 2, 2 * number + 4)[0]
        infos += told
    check_infos(infos, expected)
    check_state(state, whole, 1e-5)
