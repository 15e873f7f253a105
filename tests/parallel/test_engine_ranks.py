"""The engine on several ranks: the same losses and weights as one process, and the same bits on every rank."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmtrain.config import ModelConfig, OptimizerConfig
from lmtrain.model import DecoderLM
from lmtrain.optimizer import build_optimizer
from parallel.engine import StepInfo, TorchEngine
from parallel.world import ALONE, World
from tests.parallel.batch import ROWS, STEPS, VOCABULARY, batch
from tests.processes import run_ranks

MIXERS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "heads": 2},
    "vq": {"kind": "vq", "heads": 2, "block": 4, "codes": 4},
    "routing": {"kind": "routing", "heads": 2, "clusters": 2, "window": 8},
    "moh": {"kind": "moh", "heads": 4, "shared_heads": 1, "active_heads": 2},
}
MICRO = 1  # rows of a micro-batch: what a micro-batch alone decides (balance losses) is then the same on every world

Outcome = tuple[list[StepInfo], dict[str, Tensor]]


def make_engine(mixer: str, optimizer: str, world: World, wide: bool = False) -> TorchEngine:
    torch.manual_seed(0)
    config = ModelConfig(
        dim=16, layers=2, ffn_dim=32, vocab_size=VOCABULARY, mixers={"it": MIXERS[mixer]}, pattern="it"
    )
    model = DecoderLM(config).to(torch.float64 if wide else torch.float32)
    made = build_optimizer(model, OptimizerConfig(kind=optimizer))  # type: ignore[arg-type]
    return TorchEngine(model, made, device=torch.device("cpu"), clip=0.5, world=world)


def one_step(engine: TorchEngine, step: int, lr: float = 1e-3, spoil: int | None = None) -> StepInfo:
    """Rank r of W takes the rows r, r + W, ..; `spoil`: the rank whose gradients become NaN."""
    world = engine.world
    tokens, labels = batch(step)
    scored = int((labels >= 0).sum())
    for row in range(world.data_rank, ROWS, world.data_size):
        part = slice(row, row + MICRO)
        engine.backward(engine.forward_loss(tokens[part], labels[part], None, scored, seed=row))
    if spoil == world.rank:
        next(p.grad for p in engine.model.parameters() if p.grad is not None)[0, 0] = float("nan")
    return engine.step(lr)


def train(world: World, mixer: str, optimizer: str, wide: bool) -> Outcome:
    engine = make_engine(mixer, optimizer, world, wide)
    infos = [one_step(engine, step, lr=1e-2 if wide else 1e-3) for step in range(STEPS)]
    return infos, {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}


@pytest.mark.parametrize(
    ("mixer", "optimizer", "wide", "ranks"),
    [
        ("dense", "adamw", False, 2),
        ("dense", "muon", True, 2),
        ("vq", "adamw", False, 2),
        ("vq", "adamw", True, 4),
        ("routing", "adamw", True, 2),
        ("moh", "adamw", False, 4),
    ],
)
def test_as_in_one_process(mixer: str, optimizer: str, wide: bool, ranks: int) -> None:
    """To rounding, which in float32 and with a high learning rate grows tenfold in a few steps."""
    expected, weights = train(ALONE, mixer, optimizer, wide)
    assert expected[-1].loss < 0.98 * expected[0].loss
    outcomes: list[Outcome] = run_ranks(ranks, train, mixer, optimizer, wide)
    tolerance = 1e-10 if wide else 1e-6
    for infos, _ in outcomes:
        assert infos == outcomes[0][0]
        for info, other in zip(infos, expected, strict=True):
            assert info.loss == pytest.approx(other.loss, abs=tolerance)
            assert info.auxiliary == pytest.approx(other.auxiliary, abs=tolerance)
            assert info.grad_norm == pytest.approx(other.grad_norm, rel=100 * tolerance)
    for name, weight in outcomes[0][1].items():
        torch.testing.assert_close(weight, weights[name], atol=100 * tolerance, rtol=0, msg=name)
        assert all(torch.equal(weight, other[name]) for _, other in outcomes), f"{name} differs between ranks"
    assert (expected[0].auxiliary > 0) == (mixer != "dense")


def skip_on_all(world: World, mixer: str) -> list[Any]:
    engine = make_engine(mixer, "adamw", world)
    one_step(engine, 0)
    before = {name: tensor.clone() for name, tensor in _everything(engine).items()}
    info = one_step(engine, 1, spoil=1)
    untouched = [name for name, tensor in _everything(engine).items() if torch.equal(before[name], tensor)]
    pending = sum(float(tensor.abs().sum()) for tensor in engine.model.pending())  # type: ignore[operator]
    return [info.skipped, len(untouched) == len(before), pending, one_step(engine, 2)]


def _everything(engine: TorchEngine) -> dict[str, Tensor]:
    return {f"{group}.{name}": t for group, members in engine.state().items() for name, t in members.items()}


@pytest.mark.fault(9)
def test_what_is_not_finite_on_one_rank_is_skipped_on_all() -> None:
    one, other = run_ranks(2, skip_on_all, "vq")
    assert one[:3] == other[:3] == [True, True, 0.0]
    assert one[3] == other[3]
    assert not one[3].skipped


class Choosy(nn.Module):
    """Three weights: one that every row uses, one that the rows of rank 0 use alone, one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(3))

    def loss(self, tokens: Tensor, labels: Tensor, ctx: Any, state: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = self.weights[0].sum() + (self.weights[1].sum() if ctx == "first" else 0.0)
        return total, torch.tensor(labels.numel()), {}

    def pending(self) -> list[Tensor]:
        return []

    def after_step(self, skipped: bool = False) -> None:
        pass


def choose(world: World) -> list[Any]:
    model = Choosy()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))
    engine = TorchEngine(model, optimizer, device=torch.device("cpu"), world=world)
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    engine.backward(engine.forward_loss(tokens, tokens, "first" if world.is_first else "other", 2, seed=0))
    info = engine.step(0.1)
    steps = [float(optimizer.state()[f"step.weights.{number}"]) for number in range(3)]
    return [info.grad_norm, steps, [weight.tolist() for weight in model.weights]]


def test_a_gradient_of_one_rank_alone_and_of_none() -> None:
    one, other = run_ranks(2, choose)
    assert one == other
    norm, steps, weights = one
    assert norm == pytest.approx((2 * 1.0**2 + 2 * 0.5**2) ** 0.5)
    assert steps == [1.0, 1.0, 0.0], "the optimizer leaves a weight alone that nobody has used"
    assert weights[2] == [1.0, 1.0] != weights[1]


def send_much(world: World) -> list[float]:
    import parallel.world as module

    module.MESSAGE_BYTES = 64
    tensors = [torch.full((size,), float(world.rank + size)) for size in (3, 10, 40, 1, 7)]
    tensors.append(torch.tensor([world.rank], dtype=torch.int64))
    calls: list[int] = []
    real = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda flat, *rest: (calls.append(flat.nbytes), real(flat, *rest))[1]
    world.sum_(tensors)
    assert [t.tolist() for t in tensors[:-1]] == [[1.0 + 2 * size] * size for size in (3, 10, 40, 1, 7)]
    assert tensors[-1].tolist() == [1]
    return calls


def test_sums_travel_in_messages_of_bounded_size() -> None:
    assert run_ranks(2, send_much) == [[52, 160, 32, 8]] * 2
