"""`diagonal_scan` in C++ for CPUs: float32 against the recurrence in float64, and what no rounding excuses."""

import pytest
import torch

from attention import native
from attention.ops import scan_native
from attention.ops.scan import diagonal_scan, diagonal_scan_reference
from tests.attention.ops.test_scan import LENGTHS, RESETS, operands, resets, results

REASON = native.why_not("scan")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def by_kernel(*leaves):
    return diagonal_scan(*leaves, implementation="native")


def in_float32(leaves):
    return [t.detach().float().requires_grad_() for t in leaves]


def assert_as_defined(leaves, reset):
    """As far as float32 can tell: a decay q is rounded by 6e-8, an error shared by 1 / (1 - q) tokens, up to 50."""
    theirs = results(leaves, reset, diagonal_scan_reference)
    torch.manual_seed(2)
    y, h = by_kernel(*(single := in_float32(leaves)), reset)
    score = (y * torch.randn_like(theirs[0])).sum() + (h * torch.randn_like(theirs[1])).sum()
    ours = [y, h, *torch.autograd.grad(score, single, materialize_grads=True)]
    for mine, exact in zip(ours, theirs, strict=True):
        largest = float(exact.detach().abs().amax()) if exact.numel() else 0.0
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=4e-6 * max(1.0, largest))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("share", RESETS.values(), ids=RESETS.keys())
def test_as_defined(length, share):
    assert_as_defined(operands(length), resets(share, length))


@pytest.mark.parametrize(("channels", "numbers"), [(16, 16), (33, 1), (1, 4), (48, 5)])
def test_any_number_of_channels(channels, numbers):
    assert_as_defined(operands(130, channels=channels, numbers=numbers), resets(0.05, 130))


def test_inputs_may_be_views():
    _, *others = in_float32(operands(70, channels=6))
    wide = torch.randn(2, 70, 12)
    expected = by_kernel(wide[..., ::2].contiguous(), *others, None)
    assert all(map(torch.equal, by_kernel(wide[..., ::2], *others, None), expected))


def test_decays_of_nothing_and_of_one():
    """A logarithm of -inf forgets all, of 0 nothing."""
    x, log_decay, *others = operands(90)
    with torch.no_grad():
        log_decay[:, 0], log_decay[:, 1] = -torch.inf, 0.0
    assert_as_defined([x, log_decay, *others], None)


def test_no_bit_depends_on_threads_or_on_the_future():
    leaves, before = in_float32(operands(200, channels=40)), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(results(leaves, None, by_kernel))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *runs))
    x, *others = leaves
    later = torch.arange(200)[:, None] >= 77
    changed, _ = by_kernel(torch.where(later, 1e6 * x, x), *others, None)
    assert torch.equal(changed[:, :77], runs[0][0][:, :77])


def test_float32_on_a_cpu_takes_them(monkeypatch):
    called = []
    forward = scan_native.scan_forward
    monkeypatch.setattr(scan_native, "scan_forward", lambda *args: called.append(1) or forward(*args))
    leaves = operands(9)
    diagonal_scan(*leaves)
    diagonal_scan(*in_float32(leaves), implementation="torch")
    assert not called
    diagonal_scan(*in_float32(leaves))
    assert called


def test_operators_keep_their_contract():
    leaves, reset = in_float32(operands(70)), resets(0.05, 70)
    torch.library.opcheck(torch.ops.attention.diagonal_scan.default, (*leaves, reset, "native"))
    y, h = torch.ops.attention.diagonal_scan(*leaves, reset, "native")
    saved = [t.detach() for t in (y, h, *leaves)]
    torch.library.opcheck(torch.ops.attention.diagonal_scan_backward.default, (*saved, reset, "native"))


def test_other_types_are_told():
    with pytest.raises(ValueError, match=r"C\+\+ kernels take float32 on a CPU, got torch.float64"):
        diagonal_scan(*operands(9), implementation="native")
