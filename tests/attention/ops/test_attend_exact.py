"""What `attend` promises to the bit: the future changes nothing, and neither does a second run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention.lifetimes import FOREVER, Lifetimes, causal, window
from attention.ops import attend_torch
from attention.ops.attend import attend
from attention.ops.attend_visit import Operands

MIDDLES = [63, 100]


def result(case):
    with torch.no_grad():
        return case.call(attend)


def with_another_future(case, middle):
    """All that a query before `middle` cannot have met is replaced: queries, keys, values, biases, gates."""
    shape = case.k.shape[:3]
    unborn = (case.life.birth >= middle).expand(shape)
    for name in ("k", "v"):
        x = getattr(case, name).clone()
        x[unborn] = 1e3 * torch.randn_like(x[unborn])
        setattr(case, name, x)
    case.q = torch.cat([case.q[:, :, :middle], torch.randn_like(case.q[:, :, middle:])], 2)
    if case.key_bias is not None:
        case.key_bias = torch.where(unborn, 3.0, case.key_bias.expand(shape))
    if case.gate is not None:
        u, tau = case.gate
        tau = tau.clone()
        tau[:, :, middle:] -= 0.3
        case.gate = torch.where(unborn, 9.0, u.expand(shape)), tau


@pytest.fixture(params=["usual", "tiles alone"])
def path(request):
    if request.param == "tiles alone":
        request.getfixturevalue("small_parts")
        request.getfixturevalue("no_fused_kernel")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("middle", MIDDLES)
def test_the_future_changes_no_bit_of_the_past(drawn_in_default_time, middle):
    drawn = drawn_in_default_time
    before = result(drawn)
    with_another_future(drawn, middle)
    after = result(drawn)
    assert all(torch.equal(x[:, :, :middle], y[:, :, :middle]) for x, y in zip(before, after, strict=True))
    assert not torch.equal(before[0][:, :, middle:], after[0][:, :, middle:])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("middle", MIDDLES)
def test_later_deaths_and_births_change_no_bit_of_the_past(drawn_with_lists, middle):
    """Selected keys: when one dies, and who is born, is decided by later tokens."""
    drawn = drawn_with_lists
    before = result(drawn)
    birth, death = (x.expand(drawn.k.shape[:3]) for x in (drawn.life.birth, drawn.life.death))
    later = torch.randint(middle, 400, death.shape, dtype=torch.int32)
    death = torch.where(death >= middle, later, death)
    birth = torch.where((birth >= middle) & (later % 2 == 0), FOREVER, birth)
    drawn.life = Lifetimes(birth, death)
    after = result(drawn)
    assert all(torch.equal(x[:, :, :middle], y[:, :, :middle]) for x, y in zip(before, after, strict=True))


def assert_two_runs_are_equal(case):
    torch.set_num_threads(2)

    def run():
        leaves = [leaf.requires_grad_() for leaf in case.leaves]
        out, lse = case.call(attend)
        return out, lse, *torch.autograd.grad((out * out).sum() + lse.nan_to_num(neginf=0.0).sum(), leaves)

    assert all(map(torch.equal, run(), run()))


def test_two_runs_over_lists_are_equal_to_the_bit(drawn_with_lists):
    assert_two_runs_are_equal(drawn_with_lists)


def test_two_runs_over_slices_are_equal_to_the_bit(drawn_long):
    assert_two_runs_are_equal(drawn_long)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and 0 not in x.stride():
                self.elements = max(self.elements, x.numel())
        return result


def s2(length):
    tokens = torch.arange(length)
    block, head = tokens // 64, torch.arange(2)[:, None]
    death = torch.where((block + head) % 8 == 0, FOREVER, (block + 4) * 64)
    return Lifetimes(tokens.int().expand(2, -1), death.int())


@pytest.mark.parametrize("life", [causal, s2, lambda length: window(length, 128)], ids=["causal", "s2", "window"])
@pytest.mark.parametrize("fused", [True, False])
def test_nothing_grows_with_the_square_of_the_length(life, fused, request):
    if not fused:
        request.getfixturevalue("no_fused_kernel")

    def largest(length):
        q, k, v = (torch.randn(1, 2, length, 4) for _ in range(3))
        x = Operands(q, k, v, None, None, None, 0.5)
        with LargestTensor() as seen:
            out, lse = attend_torch.attend_forward(x, life(length), None)
            attend_torch.attend_backward(out, lse, x, life(length), None, out, lse)
        return seen.elements

    assert largest(2048) < 2048**2 // 4
    assert largest(4096) <= 2.1 * largest(2048)
