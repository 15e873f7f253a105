import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lmtrain.loss import FEW_LOGITS, default_chunk, linear_cross_entropy, token_losses

CHUNKS = [None, 1, 7, 37, 64]  # of 37 tokens: plainly at once; chunked: one each, ragged, all, more than all


def problem(tokens: int = 37, dim: int = 8, vocabulary: int = 50, dtype: torch.dtype = torch.float64):
    """hidden, weight, labels of which every fifth is not scored, with logits of several nats."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, dim, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=draw)
    labels[::5] = -100
    return hidden, weight, labels


def definition(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum in float64, on whole logits."""
    return F.cross_entropy(hidden.double() @ weight.double().T, labels, ignore_index=-100, reduction="sum")


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_cross_entropy_of_whole_logits(chunk, dtype, tolerance):
    hidden, weight, labels = problem(dtype=dtype)
    loss_sum, count = linear_cross_entropy(hidden, weight, labels, chunk)
    expected = definition(hidden, weight, labels)
    assert loss_sum.dtype == dtype
    assert loss_sum.shape == ()
    assert (count.dtype, count.shape, count.item()) == (torch.int64, (), 29)
    assert relative(loss_sum, expected) < tolerance
    # Scaled, as a mean or accumulation scales it: the backward must not forget the incoming gradient.
    ours = torch.autograd.grad(3 * loss_sum / count, (hidden, weight))
    theirs = torch.autograd.grad(3 * expected / count, (hidden, weight))
    for a, b in zip(ours, theirs):
        assert a.dtype == dtype
        assert relative(a, b) < tolerance


def test_gradcheck():
    hidden, weight, labels = problem(tokens=9, dim=3, vocabulary=5)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 4)[0], (hidden, weight))


def test_backward_twice_through_a_retained_graph_gives_the_same_gradients():
    hidden, weight, labels = problem()
    loss_sum, _ = linear_cross_entropy(hidden, weight, labels, 7)
    first = torch.autograd.grad(loss_sum, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss_sum, (hidden, weight))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second))


def test_second_derivatives_are_refused():
    hidden, weight, labels = problem()
    loss_sum, _ = linear_cross_entropy(hidden, weight, labels, 7)
    (gradient,) = torch.autograd.grad(loss_sum**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("tokens", [0, 37])
def test_nothing_scored_is_zero_everywhere(tokens, chunk):
    hidden, weight, _ = problem(tokens)
    loss_sum, count = linear_cross_entropy(hidden, weight, torch.full((tokens,), -100), chunk)
    loss_sum.backward()
    assert loss_sum.item() == 0
    assert count.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("chunk", [None, 7])
def test_large_logits_neither_overflow_nor_lose_small_probabilities(chunk):
    hidden, weight, labels = problem(dtype=torch.float32)
    large = (1000 * hidden).detach().requires_grad_()  # logits of thousands: exp overflows, most p are 0
    loss_sum, _ = linear_cross_entropy(large, weight, labels, chunk)
    loss_sum.backward()
    exact = large.detach().requires_grad_()
    expected = definition(exact, weight.detach(), labels)
    expected.backward()
    assert relative(loss_sum, expected) < 1e-6
    assert relative(large.grad, exact.grad) < 1e-5  # float32 logits of 1e4 are good to 1e-3 nats


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_hidden_state_shows_in_the_loss(poison, chunk):
    hidden, weight, labels = problem()
    with torch.no_grad():
        hidden[3] = poison
    assert not linear_cross_entropy(hidden, weight, labels, chunk)[0].isfinite()


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_label_outside_the_vocabulary_is_an_error(chunk):
    hidden, weight, labels = problem()
    for wrong in (-1, 50):
        labels[1] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, labels, chunk)


@pytest.mark.parametrize("chunk", [None, 7])
def test_only_the_wanted_gradients_are_computed(chunk):
    hidden, weight, labels = problem()
    product = 2 * 37 * 8 * 50
    for wants_hidden, wants_weight in [(True, True), (True, False), (False, True), (False, False)]:
        h, w = hidden.detach().requires_grad_(wants_hidden), weight.detach().requires_grad_(wants_weight)
        with FlopCounterMode(display=False) as flops:
            loss_sum, _ = linear_cross_entropy(h, w, labels, chunk)
            assert loss_sum.requires_grad == (wants_hidden or wants_weight)
            if loss_sum.requires_grad:
                loss_sum.backward()
        assert (h.grad is not None, w.grad is not None) == (wants_hidden, wants_weight)
        assert flops.get_total_flops() == product * (1 + wants_hidden + wants_weight)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        linear_cross_entropy(hidden, weight, labels, chunk)
    assert flops.get_total_flops() == product


def test_tied_weight_gets_both_gradients():
    _, weight, labels = problem()
    tokens = torch.arange(37)
    tied = weight.detach().requires_grad_()
    linear_cross_entropy(F.embedding(tokens, tied), tied, labels, 7)[0].backward()
    exact = weight.detach().requires_grad_()
    definition(F.embedding(tokens, exact), exact, labels).backward()
    assert relative(tied.grad, exact.grad) < 1e-12


def test_bfloat16_inputs_are_normalised_and_accumulated_in_float32():
    """Ten thousand equal tokens: summed in bfloat16 over chunks, their weight gradient would stop growing."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 8).expand(10_000, 8).bfloat16().requires_grad_()
    weight = torch.randn(50, 8).bfloat16().requires_grad_()
    labels = torch.full((10_000,), 3)
    loss_sum, _ = linear_cross_entropy(hidden, weight, labels, 8)
    expected = definition(hidden, weight, labels)
    assert loss_sum.dtype == torch.float32
    assert relative(loss_sum, expected) < 5e-3  # the logits themselves come out of a bfloat16 product
    for a, b in zip(torch.autograd.grad(loss_sum, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))):
        assert a.dtype == torch.bfloat16
        assert relative(a, b) < 1e-2


@pytest.mark.parametrize("chunk", [None, 7])
def test_autocast_runs_the_products_in_its_dtype_and_nothing_else(chunk):
    hidden, weight, labels = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, _ = linear_cross_entropy(hidden, weight, labels, chunk)
        per_token = token_losses(hidden, weight, labels)
    # The logits are those of a bfloat16 product, bit for bit; what follows is float32.
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    exact = F.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum")
    assert loss_sum.dtype == per_token.dtype == torch.float32
    assert relative(loss_sum, exact) < 1e-6
    assert relative(per_token.sum(), exact) < 1e-6
    ours = torch.autograd.grad(loss_sum, (hidden, weight))
    theirs = torch.autograd.grad(definition(hidden, weight, labels), (hidden, weight))
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.float32
        assert relative(a, b) < 1e-2


class Head(nn.Module):
    """A layer and the loss above it, in chunks of 7."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(50, 8))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        loss_sum, count = linear_cross_entropy(self.layer(x).tanh(), self.weight, labels, 7)
        return loss_sum / count


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    hidden, _, labels = problem(dtype=torch.float32)
    plain, recomputed = Head(), Head()
    plain(hidden, labels).backward()
    checkpoint(recomputed, hidden, labels, use_reentrant=reentrant).backward()
    for a, b in zip(plain.parameters(), recomputed.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_compiles_without_a_graph_break():
    hidden, _, labels = problem(dtype=torch.float32)
    eager = Head()
    compiled = copy.deepcopy(eager)
    loss = torch.compile(compiled, fullgraph=True, backend="aot_eager")(hidden, labels)
    loss.backward()
    expected = eager(hidden, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_is_registered_soundly(learns, dtype):
    hidden, weight, labels = problem(dtype=dtype)
    hidden, weight = (x.detach().requires_grad_(learn) for x, learn in zip((hidden, weight), learns))
    arguments = (hidden, weight, labels, 7, dtype, *learns)
    torch.library.opcheck(torch.ops.lmtrain.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_token_losses_are_those_of_each_token(dtype, tolerance):
    hidden, weight, labels = problem(dtype=dtype)
    losses = token_losses(hidden, weight, labels)
    logits = hidden.double() @ weight.double().T
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    assert losses.dtype == dtype
    assert not losses.requires_grad
    assert relative(losses, expected) < tolerance
    assert (losses[::5] == 0).all()


def test_defaults_chunk_where_logits_are_many():
    """Both functions over several default chunks, the last one ragged."""
    vocabulary, dim = 32_768, 2
    chunk = default_chunk(vocabulary)
    assert chunk == 256
    tokens = chunk + 3
    assert tokens * vocabulary > FEW_LOGITS
    hidden, weight, labels = problem(tokens, dim, vocabulary)
    loss_sum, _ = linear_cross_entropy(hidden, weight, labels)
    expected = definition(hidden, weight, labels)
    assert relative(loss_sum, expected) < 1e-12
    assert relative(token_losses(hidden, weight, labels).sum(), expected) < 1e-12
    ours = torch.autograd.grad(loss_sum, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    assert max(relative(a, b) for a, b in zip(ours, theirs)) < 1e-12
    assert default_chunk(10**6) == 256
    assert default_chunk(256) * 256 * 8 == 64 * 2**20
