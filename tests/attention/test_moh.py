"""Mixture-of-Head: gates, what a choice saves, the loss, its limits, and what other implementations got wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attention.mixer import Context, build, read_settings
from attention.moh import MoH
from tests.conformance.oracle import load, multi_head_attention

ORACLE = load("moh")
DIM = 16
USUAL = {"heads": 8, "kv_heads": 4, "head_dim": 4, "shared_heads": 2, "active_heads": 3}
SETTINGS = {
    "usual": {},
    "a group of both kinds": {"kv_heads": 2, "shared_heads": 3},
    "all routed": {"shared_heads": 0},
    "one active": {"active_heads": 1},
    "gates of the paper": {"rescale": False},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def ready(std: float = 0.5, **settings: Any) -> MoH:
    """In float64, always from the same seed, with a router whose mind is made up."""
    torch.manual_seed(0)
    mixer = build("moh", DIM, **USUAL | settings).double()
    assert isinstance(mixer, MoH)
    torch.nn.init.normal_(mixer.router.weight, std=std)
    return mixer


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# Computing what was chosen, or all


@each_setting
def test_a_choice_saves_work_and_changes_nothing(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of queries for each head, against all heads for all queries times gates of which some are 0."""
    mixer, x = ready(**settings), tokens(150).requires_grad_()
    inputs = [x, *mixer.parameters()]
    results = []
    for few in (False, True):
        mix = mixer._mix

        def forced(*args: Any, few: bool, mix: Any = mix, always: bool = few) -> Tensor:
            return mix(*args, few=always)

        with monkeypatch.context() as patch:
            patch.setattr(mixer, "_mix", forced)
            y, losses = mixer(x)
        results.append([y, *torch.autograd.grad(y.square().sum() + losses["balance"], inputs)])
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs, atol=1e-11)
    same(results[0][0], ORACLE.definition(mixer, x, Context()))


@each_setting
@pytest.mark.parametrize("length", [40, 200])
def test_the_work_is_the_share_of_heads_that_serve(settings: dict[str, Any], length: int) -> None:
    """Exactly, whatever is chosen: in a batch, too."""
    mixer = ready(**settings)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(tokens(length, batch=3))
    cost = mixer.cost(length)
    assert counter.get_total_flops() == 3 * cost.flops
    serving, kv_heads = mixer.shared_heads + mixer.active, mixer.kv_heads
    assert cost.pairs == serving * length * (length + 1) / 2
    matrices = 2 * DIM * 4 * (serving + kv_heads) + mixer.router.weight.numel()
    assert cost.flops == 2 * length * matrices + 4 * 4 * cost.pairs


def test_every_key_stays() -> None:
    """A choice of queries frees no key: the state is that of dense attention, as large as all tokens."""
    mixer, dense = ready(), build("dense", DIM, heads=8, kv_heads=4, head_dim=4).double()
    state = mixer.init_state(2)
    with torch.no_grad():
        mixer(tokens(50), None, state)
    assert state.bytes == 2 * mixer.cost(50).state_bytes == 2 * dense.cost(50).state_bytes


# Gates


def test_a_router_that_knows_nothing_has_gates_of_one() -> None:
    """All chosen, all alike: dense attention."""
    mixer, x = ready(std=0.0, active_heads=6), tokens(30)
    assert (mixer._route(x).gates == 1).all()
    same(mixer(x).y, multi_head_attention(mixer, x, Context()))


def test_shared_heads_alone_are_dense() -> None:
    mixer, x = ready(std=0.0, shared_heads=8, active_heads=0), tokens(30)
    output = mixer(x)
    same(output.y, multi_head_attention(mixer, x, Context()))
    assert output.losses == {}


def test_of_equal_heads_the_first_are_chosen() -> None:
    serves = ready(std=0.0)._route(tokens(30)).serves
    assert (serves == torch.tensor([True] * 5 + [False] * 3)[:, None]).all()


@each_setting
def test_gates_are_those_of_the_definition(settings: dict[str, Any]) -> None:
    mixer, x = ready(**settings), tokens(20)
    routes = mixer._route(x)
    same(routes.gates, ORACLE.gate_matrix(mixer, x)[..., 0])
    assert (routes.serves.sum(1) == mixer.shared_heads + mixer.active).all()
    both = mixer.shared_heads > 0
    if mixer.config.rescale:
        kinds = [routes.gates[:, : mixer.shared_heads].sum(1), routes.gates[:, mixer.shared_heads :].sum(1)]
        number = [mixer.shared_heads, mixer.active]
        parts = [kind / n for kind, n in zip(kinds, number, strict=True) if n]
        same(sum(parts), torch.full((2, 20), 2.0 if both else 1.0, dtype=torch.float64))
    else:
        assert (routes.gates.sum(1) < 1).all()


def test_a_head_that_nobody_chose_learns_nothing() -> None:
    mixer, x = ready(), tokens(60).abs()
    with torch.no_grad():
        mixer.router.weight[5] = -50.0
    mixer(x).y.square().sum().backward()
    of_head = slice(7 * 4, 8 * 4)  # two shared heads come before the routed ones
    assert not mixer._route(x).serves[:, 7].any()
    assert not mixer.qkv.weight.grad[of_head].any()
    assert not mixer.output.weight.grad[:, of_head].any()
    others = mixer.qkv.weight.grad[: 7 * 4].abs().sum(1)
    assert (others > 0).all()


def test_the_choice_is_not_rounded_to_16_bits() -> None:
    mixer, x = ready().float(), tokens(400).float()
    with torch.no_grad():
        mixer.router.weight.copy_(mixer.router.weight.bfloat16())
        x = x.bfloat16().float()
    exact = mixer._route(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mixer._route(x)
    assert torch.equal(rounded.serves, exact.serves)
    assert rounded.gates.dtype == torch.float32
    same(rounded.gates, exact.gates, atol=1e-6)
    assert torch.equal(mixer.bfloat16()._route(x.bfloat16()).serves, exact.serves)


# The router's parameters and its loss


def test_the_router_has_rows_for_what_serves() -> None:
    dense = build("dense", DIM, heads=8, kv_heads=4, head_dim=4).cost(1).parameters
    rows = {(2, 3): 6 + 2 + 2, (0, 3): 8, (8, 0): 8, (2, 0): 2}
    for (shared, active), number in rows.items():
        mixer = ready(shared_heads=shared, active_heads=active)
        assert mixer.cost(1).parameters == dense + number * DIM
    torch.manual_seed(0)
    router = build("moh", 512).router.weight
    assert float(router.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert router.no_weight_decay


def test_the_loss_is_the_number_chosen_where_all_are_alike() -> None:
    """And more where the likely heads are chosen often."""
    x = tokens(500)
    alike = ready(std=0.0, balance=0.1)(x).losses["balance"]
    same(alike, torch.tensor(0.1 * 3, dtype=torch.float64))
    assert ready(std=2.0, balance=0.1)(x).losses["balance"] > alike


def test_the_loss_by_loops() -> None:
    mixer, x = ready(balance=0.1), tokens(20).requires_grad_()
    p = torch.stack([row @ mixer.router.weight[:6].T for row in x.flatten(0, 1)]).softmax(-1)
    chosen = [sorted(range(6), key=lambda i: -float(row[i]))[:3] for row in p.detach()]
    share = [sum(i in mine for mine in chosen) / 40 for i in range(6)]
    expected = 0.1 * 6 * sum(p[:, i].mean() * share[i] for i in range(6))
    loss = mixer(x).losses["balance"]
    same(loss, expected)
    same(*(torch.autograd.grad(value, mixer.router.weight)[0] for value in (loss, expected)))


def test_the_loss_is_one_of_training_and_comes_once() -> None:
    """Kept in a global list it would be added again when a layer is recomputed."""
    mixer, x = ready(), tokens(20).requires_grad_()
    losses, gradients = [], []
    for recomputed in (False, True):
        output = checkpoint(mixer, x, use_reentrant=False) if recomputed else mixer(x)
        losses.append(output.losses["balance"])
        gradients += torch.autograd.grad(output.losses["balance"], mixer.router.weight)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)
    assert mixer.eval()(x).losses == {}
    assert set(mixer(x, Context(training=True)).losses) == {"balance"}
    assert mixer.train()(x, Context(training=False)).losses == {}


# Settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shared_heads": 9}, ("shared_heads", "shared_heads 9 exceeds heads 8; nearest: 8")),
        ({"active_heads": 7}, ("active_heads", "active_heads 7 exceeds heads - shared_heads = 6; nearest: 6")),
        ({"heads": 4}, ("active_heads", "active_heads 4 exceeds heads - shared_heads = 2; nearest: 2")),
        (
            {"shared_heads": 0, "active_heads": 0},
            ("active_heads", "active_heads 0 must be >= 1 while shared_heads is 0: a token needs a head"),
        ),
        ({"balance": -0.1}, ("balance", "balance must be >= 0, got -0.1")),
        ({"kv_heads": 3}, ("kv_heads", "kv_heads 3 does not divide heads 8; nearest: 2, 4")),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], expected: tuple[str, str]) -> None:
    assert read_settings("moh", 32, settings)[1] == [expected]
