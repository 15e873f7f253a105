"""The engine against a step written out by hand."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.engine import LossScale, TorchEngine


class Bigram(nn.Module):
    """The smallest language model: a table of logits, with an auxiliary loss if asked for."""

    def __init__(self, auxiliary: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(5, 5))
        self.auxiliary = auxiliary
        self.skips: list[bool] = []

    def loss(
        self, tokens: Tensor, labels: Tensor, ctx: Any, state: Any = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = F.cross_entropy(self.table[tokens].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        losses = {"size": 0.1 * self.table.square().mean()} if self.auxiliary else {}
        return total, (labels >= 0).sum(), losses

    def pending(self) -> list[Tensor]:
        return []

    def after_step(self, skipped: bool = False) -> None:
        self.skips.append(skipped)


class Descent:
    """Plain gradient descent behind the interface that an engine asks for."""

    def __init__(self, model: nn.Module) -> None:
        self.sgd = torch.optim.SGD(model.parameters(), lr=1.0)

    def step(self, lr: float) -> None:
        self.sgd.param_groups[0]["lr"] = lr
        self.sgd.step()

    def zero_grad(self) -> None:
        self.sgd.zero_grad()

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError("unexpected " + ", ".join(state))


def engine(model: Bigram, **settings: Any) -> TorchEngine:
    return TorchEngine(model, Descent(model), device=torch.device("cpu"), **settings)


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(5, (rows, 9), generator=generator)
    labels = text[:, 1:].clone()
    labels[0, :3] = -100
    return text[:, :-1], labels


def run(engine: TorchEngine, tokens: Tensor, labels: Tensor, micro: int, lr: float = 0.5) -> Any:
    scored = int((labels >= 0).sum())
    for at in range(0, len(tokens), micro):
        part = slice(at, at + micro)
        engine.backward(engine.forward_loss(tokens[part], labels[part], None, scored, seed=at))
    return engine.step(lr)


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_a_step_is_the_mean_over_scored_labels_however_it_is_cut(micro: int, auxiliary: bool) -> None:
    model = Bigram(auxiliary)
    by_hand = copy.deepcopy(model)
    tokens, labels = batch()
    info = run(engine(model), tokens, labels, micro)
    total, count, losses = by_hand.loss(tokens, labels, None)
    added = sum(losses.values(), torch.zeros(()))
    (total / count + added).backward()
    assert by_hand.table.grad is not None
    torch.testing.assert_close(model.table.detach(), by_hand.table.detach() - 0.5 * by_hand.table.grad)
    assert info.loss == pytest.approx(float(total.detach() / count), rel=1e-6)
    assert info.auxiliary == pytest.approx(float(added.detach()), rel=1e-6)
    assert info.grad_norm == pytest.approx(float(by_hand.table.grad.norm()), rel=1e-6)
    assert (info.lr, info.skipped, model.skips) == (0.5, False, [False])


def test_clipping_shortens_the_gradient_and_reports_its_length_before() -> None:
    model = Bigram()
    before = model.table.detach().clone()
    info = run(engine(model, clip=0.01), *batch(), micro=4, lr=1.0)
    assert info.grad_norm > 0.01
    assert float((model.table.detach() - before).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.fault(9)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing_and_the_next_step_is_a_clean_one(where: str) -> None:
    model, twin = Bigram(), Bigram()
    tokens, labels = batch()
    under_test = engine(model)
    if where == "loss":
        loss = under_test.forward_loss(tokens, labels, None, 1, seed=0)
        under_test.backward(loss * float("inf"))
        under_test._loss_sum += float("nan")
    else:
        under_test.backward(under_test.forward_loss(tokens, labels, None, 1, seed=0))
        assert model.table.grad is not None
        model.table.grad[0, 0] = float("nan")
    info = under_test.step(0.5)
    assert info.skipped
    assert model.skips == [True]
    assert torch.equal(model.table, twin.table)
    again, expected = run(under_test, tokens, labels, 2), run(engine(twin), tokens, labels, 2)
    assert (again.loss, again.skipped) == (expected.loss, False)
    assert torch.equal(model.table, twin.table)


def test_state_round_trip_and_a_state_of_another_model() -> None:
    one, other = engine(Bigram()), engine(Bigram())
    run(one, *batch(), micro=2)
    other.load_state(one.state())
    assert torch.equal(one.model.table, other.model.table)
    with pytest.raises(ValueError, match="another model"):
        other.load_state({"model": {"chair": torch.zeros(1)}, "optimizer": one.state()["optimizer"]})


def test_loss_scale_halves_after_an_overflow_and_doubles_with_patience() -> None:
    scale = LossScale(8.0)
    scale.update(finite=False)
    assert scale.scale == 4.0
    for _ in range(LossScale.PATIENCE):
        scale.update(finite=True)
    assert scale.scale == 8.0
    kept = LossScale(1.0)
    kept.load(scale.tensor())
    assert (kept.scale, kept.good_steps) == (scale.scale, scale.good_steps)


def test_a_scaled_loss_gives_the_same_update() -> None:
    plain, scaled = engine(Bigram()), engine(Bigram())
    scaled._scale.scale = 1024.0
    tokens, labels = batch()
    one, other = run(plain, tokens, labels, 4), run(scaled, tokens, labels, 4)
    assert one.grad_norm == other.grad_norm
    assert torch.equal(plain.model.table, scaled.model.table)
