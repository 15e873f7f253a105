"""ZeRO at every stage against plain torch in one process: losses, norms, weights, moments, and what they save.

Few processes, each doing much: importing DeepSpeed takes a second in each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmtrain.config import ModelConfig, OptimizerConfig
from lmtrain.model import DecoderLM
from lmtrain.optimizer import Optimizer, torch_adamw
from parallel.deepspeed import DeepSpeedEngine
from parallel.engine import StepInfo, TorchEngine
from parallel.world import ALONE, World
from tests.parallel.batch import ROWS, STEPS, VOCABULARY, batch
from tests.processes import run_ranks

CPU = torch.device("cpu")
SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # else the small weights are kept everywhere
STAGES = (1, 2, 3)
LATE = 17  # where runs are cut in two
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
    optimizer = settings.pop("optimizer", None) or torch_adamw(model, OptimizerConfig())
    if isinstance(kind, str):
        made = TorchEngine(model, Optimizer([optimizer]), **settings)
    else:
        made = DeepSpeedEngine(model, optimizer, stage=kind, **{"extra": SPREAD, **settings})
    with closing(made):
        yield made


def spoil_value(loss: Tensor) -> Tensor:
    return loss + float("inf")  # whose gradient is finite


def spoil_gradient(loss: Tensor) -> Tensor:
    loss = loss * 1.0
    loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss


def one_step(engine: Any, step: int, lr: float = 8e-4, spoil: Callable[[Tensor], Tensor] | None = None) -> StepInfo:
    """Rank r of W takes the rows r, r + W, .., each a micro-batch; `spoil`: what the last does to its last loss."""
    tokens, labels = batch(step)
    scored = int((labels >= 0).sum())
    for row in range(engine.world.rank, ROWS, engine.world.size):
        part = slice(row, row + 1)
        loss = engine.forward_loss(tokens[part], labels[part], None, scored, seed=row)
        engine.backward(spoil(loss) if spoil is not None and row == ROWS - 1 else loss)
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
    spoilt: list[bool]
    changed_by_spoilt: list[str]
    pending_after_spoilt: float
    again: list[StepInfo]
    from_torch: list[StepInfo]
    from_late: list[StepInfo]
    late_differs: list[str]


def stage_on_ranks(world: World, stage: int, of_torch: State) -> Seen:
    """All that is asked of a stage: training whole, from its own late state, and from torch's; a spoilt step."""
    with engine_of(stage, world) as engine:
        infos = train(engine, last=LATE)
        late = copied(engine)
        infos += train(engine, first=LATE)
        whole = copied(engine)
        spoilt = [one_step(engine, 0, spoil=how).skipped for how in (spoil_value, spoil_gradient)]
        changed = same_bits(whole, copied(engine))
        pending = sum(float(x.abs().sum()) for x in engine.model.pending())  # type: ignore[operator]
        again = train(engine, last=2)
    shared = [late] if world.size == 1 else broadcast(late)
    with engine_of(stage, world) as engine:
        one_step(engine, 5)  # whatever there was is replaced
        engine.load_state(shared[0])
        from_late = train(engine, first=LATE)
        differs = same_bits(whole, copied(engine))
        engine.load_state(of_torch)
        from_torch = train(engine, first=LATE)
    return Seen(infos, whole, spoilt, changed, pending, again, from_torch, from_late, differs)


def broadcast(state: State) -> list[State]:
    box = [state]
    torch.distributed.broadcast_object_list(box)
    return box


def on_ranks(world: World, of_torch: State, stages: tuple[int, ...]) -> dict[int, Seen]:
    return {stage: stage_on_ranks(world, stage, of_torch) for stage in stages}


@dataclasses.dataclass
class Reference:
    """Torch in one process: all steps, the state late and at the end."""

    infos: list[StepInfo]
    late: State
    whole: State
    again: list[StepInfo]


@pytest.fixture(scope="module")
def reference() -> Reference:
    with engine_of("torch") as engine:
        infos = train(engine, last=LATE)
        late = copied(engine)
        infos += train(engine, first=LATE)
        whole = copied(engine)
        assert infos[-1].loss < 0.8 * infos[0].loss
        assert min(info.grad_norm for info in infos) > 0.5, "every step must be clipped"
        return Reference(infos, late, whole, train(engine, last=2))


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4))])
def test_every_stage_is_plain_torch(reference: Reference, ranks: int) -> None:
    """The same losses, norms, weights and moments, whole and continued from any state; the same bits from its own."""
    outcomes = run_ranks(ranks, on_ranks, reference.late, STAGES)
    for stage in STAGES:
        seen: Seen = outcomes[0][stage]
        check_infos(seen.infos, reference.infos)
        check_state(seen.state, reference.whole, 1e-5)
        check_infos(seen.from_torch, reference.infos[LATE:])
        assert seen.from_late == seen.infos[LATE:], f"stage {stage}"
        assert seen.late_differs == [], f"stage {stage}"
        assert seen.spoilt == [True, True]
        assert seen.changed_by_spoilt == [], f"stage {stage}"
        assert seen.pending_after_spoilt == 0
        check_infos(seen.again, reference.again)
        for other in outcomes[1:]:
            assert other[stage].infos == seen.infos, "the ranks tell the same"
            assert other[stage].spoilt == [True, True]
            assert other[stage].state == {"model": {}, "optimizer": {}}, "the first rank alone holds the whole"
        with engine_of("torch") as engine:
            engine.load_state(seen.state)
            check_infos(train(engine, last=2), reference.again)


def descend(world: World, kind: int | str, clip: float) -> tuple[list[float], State]:
    """Plain gradient descent: it shows a gradient that is scaled wrongly, which AdamW does not."""
    model = make_model()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
    with engine_of(kind, world, model, clip=clip, optimizer=optimizer) as engine:
        return [info.grad_norm for info in train(engine, last=3, lr=0.05)], copied(engine)


def by_hand(clip: float) -> tuple[list[float], dict[str, Tensor]]:
    """The definition of such a step, from the loss of all rows at once."""
    model, norms = make_model(), []
    for step in range(3):
        model.zero_grad()
        tokens, labels = batch(step)
        scored = (labels >= 0).sum()
        for row in range(ROWS):
            total, count, losses = model.loss(tokens[row : row + 1], labels[row : row + 1])
            (total / scored + sum(losses.values()) * count / scored).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
        model.after_step()
    return norms, dict(model.state_dict())


def read_model(engine: Any, model: DecoderLM) -> list[Tensor]:
    """What evaluation and generation do with a model: hidden states, the head's weights, states carried on."""
    state = model.init_state(1)
    hidden, _ = model.hidden(batch(3)[0])
    carried = [model(batch(3)[0][:1, part], None, state) for part in (slice(0, 7), slice(7, 16))]
    return [nn.functional.linear(hidden, model.head_weight), *carried]


def read_while_training(world: World, stage: int) -> list[Any]:
    """Reading before, between and after steps changes nothing, and reads what is there; what fails inside gets out."""
    model = make_model()
    with engine_of(stage, world, model) as engine:
        before = engine.reading(lambda: read_model(engine, model))
        infos = train(engine, last=2)
        between = engine.reading(lambda: read_model(engine, model))
        infos += train(engine, first=2, last=5)
        with pytest.raises(ZeroDivisionError):
            engine.reading(lambda: read_model(engine, model) and 1 / 0)
        infos += train(engine, first=5, last=7)
        sizes = [model.layers[0].ffn.up.weight.numel(), len(model.head_weight)]
    return [before, between, infos, sizes]


def islands(world: World, stage: int) -> dict[str, torch.dtype]:
    """The dtypes of everything, in a model trained in bfloat16, and its losses."""
    settings = {"mixers": {**MIXERS, "mosa": {"kind": "mosa", "heads": 2, "keep": 8}}, "pattern": "dense vq mega mosa"}
    model = make_model(layers=4, dim=12, **settings)
    with engine_of(stage, world, model, dtype="bfloat16") as engine:
        train(engine, last=2)
        held = [*model.named_parameters(), *model.named_buffers()]
        return {name: tensor.dtype for name, tensor in held if tensor.is_floating_point()}


def narrow(world: World, kind: int | str, dtype: str = "bfloat16") -> list[StepInfo]:
    """By plain descent, which does not blow up what differs by rounding, as AdamW does with small gradients; without
    Mega, whose linear layers have biases: at stage 3 DeepSpeed adds those to what is rounded already."""
    model = make_model(pattern="dense vq")
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
    with engine_of(kind, world, model, optimizer=optimizer, dtype=dtype) as engine:
        return train(engine, last=6, lr=0.05)


def offloaded(world: World, stage: int) -> list[StepInfo]:
    """In the memory of the CPU, and with layers computed again; the last steps from a state."""
    model, again = make_model(), make_model()
    model.activation_checkpointing = again.activation_checkpointing = True
    with engine_of(stage, world, model, offload=True) as engine:
        infos = train(engine, last=3)
        kept = broadcast(copied(engine))[0]
    with engine_of(stage, world, again, offload=True) as engine:
        engine.load_state(kept)
        return infos + train(engine, first=3, last=5)


def strangers(world: World, stage: int) -> tuple[list[str], State]:
    """What is said about a state of another model, on each rank, though only the last has been given a wrong one; and
    the state of an engine that has not trained."""
    told = []
    with engine_of(stage, world) as engine:
        good = broadcast(copied(engine))[0]
        for group, name in (("model", "embedding.weight"), ("optimizer", "exp_avg.embedding.weight")):
            wrong = {g: dict(members) for g, members in good.items()}
            if world.rank == world.size - 1:
                wrong[group]["chair"] = wrong[group].pop(name)
                wrong["model"]["norm.weight"] = torch.zeros(3)
            with pytest.raises(ValueError, match="belongs to another model") as error:
                engine.load_state(wrong)
            told.append(str(error.value))
        kept = copied(engine)
        assert not world.is_first or same_bits(good, kept) == []
    return told, good


def more_on_ranks(world: World, stages: tuple[int, ...]) -> dict[str, Any]:
    """Several questions to the same processes."""
    asked: dict[str, Any] = {}
    for stage in stages:
        asked |= {
            f"sgd {stage}": [descend(world, stage, clip) for clip in (0.5, 0.0)],
            f"read {stage}": read_while_training(world, stage),
            f"islands {stage}": islands(world, stage),
            f"narrow {stage}": narrow(world, stage),
            f"offloaded {stage}": offloaded(world, stage),
            f"strangers {stage}": strangers(world, stage),
        }
    return asked


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, more_on_ranks, STAGES)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_a_step_of_plain_descent(two_ranks: list[dict[str, Any]], stage: int, clip: float) -> None:
    norms, state = two_ranks[0][f"sgd {stage}"][0 if clip else 1]
    expected, weights = by_hand(clip)
    assert min(expected) > 0.5
    assert norms == pytest.approx(expected, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(state["model"][name], weight, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_reading_outside_of_training(two_ranks: list[dict[str, Any]], reference: Reference, stage: int) -> None:
    model = make_model()
    with engine_of("torch", model=model) as engine, torch.no_grad():
        before = read_model(engine, model)
        with torch.enable_grad():
            train(engine, last=2)
        between = read_model(engine, model)
    for outcome in two_ranks:
        seen_before, seen_between, infos, sizes = outcome[f"read {stage}"]
        for seen, expected in ((seen_before, before), (seen_between, between)):
            for tensor, other in zip(seen, expected, strict=True):
                torch.testing.assert_close(tensor, other, atol=1e-5, rtol=0)
        check_infos(infos, reference.infos[:7])
        assert sizes == ([0, 0] if stage == 3 else [33 * 15, VOCABULARY]), "at stage 3 the weights are put away again"


@pytest.mark.parametrize("stage", STAGES)
def test_weights_and_what_must_not_be_rounded_stay_float32(two_ranks: list[dict[str, Any]], stage: int) -> None:
    dtypes = two_ranks[0][f"islands {stage}"]
    assert {"router", "means", "count", "alpha"} <= {name.rpartition(".")[2] for name in dtypes} | {
        part for name in dtypes for part in name.split(".")
    }
    assert set(dtypes.values()) == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16(two_ranks: list[dict[str, Any]], stage: int) -> None:
    """As plain torch in bfloat16, whose losses are others than those of float32."""
    expected, wide = narrow(ALONE, "torch"), narrow(ALONE, "torch", "float32")
    assert min(abs(info.loss - other.loss) for info, other in zip(expected, wide, strict=True)) > 1e-4
    check_infos(two_ranks[0][f"narrow {stage}"], expected, 1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_offload_and_activation_checkpointing(
    two_ranks: list[dict[str, Any]], reference: Reference, stage: int
) -> None:
    check_infos(two_ranks[0][f"offloaded {stage}"], reference.infos[:5])


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_of_another_model_is_refused_on_all_ranks(two_ranks: list[dict[str, Any]], stage: int) -> None:
    (one, fresh), (other, _) = (outcome[f"strangers {stage}"] for outcome in two_ranks)
    assert one == other
    with engine_of("torch") as engine:
        check_state(fresh, copied(engine), 0.0)
    assert "missing embedding.weight; unexpected chair" in one[0]
    assert "norm.weight is [3], not [15]" in one[0]
    assert "missing exp_avg.embedding.weight" in one[1]
