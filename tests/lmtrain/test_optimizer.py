from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lmtrain.optimizer import build_optimizer, hidden_matrices


def settings(**changes):
    defaults = {"kind": "adamw", "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return SimpleNamespace(**(defaults | changes))


class Model(nn.Module):
    """One parameter of every sort that the optimizers tell apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.up = nn.Linear(8, 12)
        self.router = nn.Linear(12, 4, bias=False)
        self.router.weight.no_weight_decay = True
        self.stack = nn.Parameter(torch.randn(4, 12, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    @property
    def head_weight(self) -> Tensor:
        return self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: len(tokens)]
        x = self.up(x).relu()
        x = torch.einsum("te,td,edf->tf", self.router(x).softmax(-1), x, self.stack)
        return self.head(self.norm(self.frozen(x)))


def train(model, optimizer, steps, first=0):
    """Steps on data and at learning rates that depend on the step alone."""
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        model(torch.randint(11, (5,), generator=draw)).logsumexp(-1).sum().backward()
        optimizer.step(1e-2 / (step + 1))
        optimizer.zero_grad()


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def groups_of(optimizer):
    """{parameter name: (optimizer, weight decay)}"""
    return {
        name: (type(part).__name__, group["weight_decay"])
        for part in optimizer.parts
        for group in part.param_groups
        for name in group["param_names"]
    }


DECAYED, KEPT = ("AdamW", 0.1), ("AdamW", 0.0)
ADAMW = {
    "embedding.weight": DECAYED,
    "positions": DECAYED,
    "up.weight": DECAYED,
    "up.bias": KEPT,
    "router.weight": KEPT,
    "stack": DECAYED,
    "norm.weight": KEPT,
    "norm.bias": KEPT,
    "head.weight": DECAYED,
}


def test_matrices_decay_and_vectors_and_marked_parameters_do_not():
    assert groups_of(build_optimizer(Model(), settings())) == ADAMW


def test_muon_takes_the_hidden_matrices_only():
    optimizer = build_optimizer(Model(), settings(kind="muon"))
    assert groups_of(optimizer) == ADAMW | {"up.weight": ("Muon", 0.1)}


def test_a_linear_layer_tied_to_an_embedding_is_no_hidden_matrix():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    assert hidden_matrices(model) == {model[1].weight}
    model[1].weight = model[0].weight
    assert hidden_matrices(model) == set()
    assert groups_of(build_optimizer(model, settings(kind="muon"))) == {"0.weight": DECAYED}


def test_a_model_of_hidden_matrices_alone_has_no_adamw():
    model = nn.Linear(4, 4, bias=False)
    assert groups_of(build_optimizer(model, settings(kind="muon"))) == {"weight": ("Muon", 0.1)}


def test_shakespeare_model_decays_802944_parameters():
    """nanoGPT's small model: 4 layers, width 128, 65 characters, 64 positions, no biases, tied head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(128, bias=False) for _ in range(2))
            shapes = [(128, 384), (128, 128), (128, 512), (512, 128)]
            self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in shapes)

    blocks = [Block() for _ in range(4)]
    tables = [nn.Embedding(65, 128), nn.Embedding(64, 128)]
    model = nn.Sequential(*tables, *blocks, nn.LayerNorm(128, bias=False))
    assert build_optimizer(model, settings()).summary().splitlines() == [
        "AdamW: 802,944 parameters in 18 tensors, weight decay 0.1",
        "AdamW: 1,152 parameters in 9 tensors, weight decay 0",
    ]


def test_adamw_follows_its_definition():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, settings())
    weight, bias = (p.detach().double().clone() for p in (model.weight, model.bias))
    moments = {id(x): (torch.zeros_like(x), torch.zeros_like(x)) for x in (weight, bias)}
    for step in range(1, 6):
        lr = 0.1 / step
        for ours, exact, decay in [(model.weight, weight, 0.1), (model.bias, bias, 0.0)]:
            ours.grad = torch.randn_like(ours)
            gradient = ours.grad.double()
            first, second = moments[id(exact)]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.95).add_(0.05 * gradient**2)
            exact.mul_(1 - lr * decay)
            root = (second / (1 - 0.95**step)).sqrt()
            exact.sub_(lr * first / (1 - 0.9**step) / (root + 1e-8))
        optimizer.step(lr)
    torch.testing.assert_close(model.weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias.double(), bias, rtol=1e-5, atol=1e-6)


def test_muons_first_update_is_orthogonal_and_of_adamws_size():
    """Singular values of about 0.2 sqrt(longer side), so an RMS of about 0.2, a typical AdamW update's.

    About: Newton-Schulz as Muon runs it leaves singular values between 0.5 and 1.5 of that, as torch says.
    Its other scale, sqrt(max(1, rows / columns)), would be 0.31 of ours here.
    """
    torch.manual_seed(0)
    model = nn.Linear(256, 32, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, settings(kind="muon", weight_decay=0.0))
    model.weight.grad = torch.randn(32, 256)
    optimizer.step(0.5)
    update = (before - model.weight.detach()) / 0.5
    singular_values = torch.linalg.svdvals(update) / (0.2 * 256**0.5)
    assert 0.5 < singular_values.min() <= singular_values.max() < 1.5


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_group_takes_the_rate_of_the_step(kind):
    """Not the one it was built with: at rate 0 nothing moves, at another everything does."""
    model = Model()
    optimizer = build_optimizer(model, settings(kind=kind, lr=123.0))
    before = copies(dict(model.named_parameters()))
    model(torch.arange(5)).logsumexp(-1).sum().backward()
    optimizer.step(0.0)
    assert_equal(copies(dict(model.named_parameters())), before)
    optimizer.step(1e-2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(groups_of(optimizer))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_five_steps_saved_and_five_more_are_ten(kind):
    whole = Model()
    straight = build_optimizer(whole, settings(kind=kind))
    train(whole, straight, 10)

    first = Model()
    interrupted = build_optimizer(first, settings(kind=kind))
    train(first, interrupted, 5)
    model, saved = copies(first.state_dict()), copies(interrupted.state())

    second = Model()
    resumed = build_optimizer(second, settings(kind=kind))
    train(second, resumed, 2)  # whatever was there before must go
    second.load_state_dict(model)
    resumed.load_state(saved)
    train(second, resumed, 5, first=5)
    assert_equal(second.state_dict(), whole.state_dict())
    assert_equal(resumed.state(), straight.state())


def test_state_is_float32_by_name_and_whole_before_the_first_step():
    model = Model()
    state = build_optimizer(model, settings(kind="muon")).state()
    adamw = [name for name in ADAMW if name != "up.weight"]
    names = {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in adamw}
    assert state.keys() == names | {"momentum_buffer.up.weight"}
    shapes = dict(model.named_parameters())
    for key, value in state.items():
        kind, name = key.split(".", 1)
        assert value.dtype == torch.float32
        assert value.shape == (() if kind == "step" else shapes[name].shape)
        assert not value.any()


def test_loading_names_everything_that_does_not_fit_and_changes_nothing():
    model = Model()
    optimizer = build_optimizer(model, settings())
    train(model, optimizer, 1)
    before = copies(optimizer.state())
    wrong = {key: torch.zeros_like(value) for key, value in before.items()}
    del wrong["exp_avg.norm.weight"]
    wrong["momentum_buffer.up.weight"] = torch.zeros(12, 8)
    wrong["exp_avg_sq.up.weight"] = torch.zeros(8, 12)
    wrong["exp_avg.stack"] = torch.zeros(4, 12, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="optimizer state") as error:
        optimizer.load_state(wrong)
    assert str(error.value).split(": ", 1)[1].split("; ") == [
        "exp_avg.stack is float64 [4, 12, 8], not float32 [4, 12, 8]",
        "exp_avg_sq.up.weight is float32 [8, 12], not float32 [12, 8]",
        "missing exp_avg.norm.weight",
        "unexpected momentum_buffer.up.weight",
    ]
    assert_equal(optimizer.state(), before)


def test_a_parameter_without_a_gradient_is_left_alone():
    model = Model()
    optimizer = build_optimizer(model, settings())
    before = copies(dict(model.named_parameters()))
    model.norm.bias.grad = torch.ones(8)
    optimizer.step(1e-2)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["norm.bias"]
    assert [key for key, value in optimizer.state().items() if value.any()] == [
        "step.norm.bias",
        "exp_avg.norm.bias",
        "exp_avg_sq.norm.bias",
    ]
