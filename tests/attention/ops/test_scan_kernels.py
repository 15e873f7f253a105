"""The Triton kernels of `diagonal_scan` against its definition: in the interpreter, or on the GPU if there is one."""

import pytest
import torch

from attention.ops import scan_triton
from attention.ops.scan import diagonal_scan, diagonal_scan_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def many_small_programs(monkeypatch):
    """Several chunks and blocks of channels in few numbers; a GPU keeps the sizes that it will use."""
    if DEVICE == "cpu":
        monkeypatch.setattr(scan_triton, "CHUNK", 8)
        monkeypatch.setattr(scan_triton, "CHANNELS", 4)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What a kernel leaves unwritten is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(batch, length, channels, numbers, dtype=torch.float32, resets=None):
    """x, log_decay, b, c, h0 and reset on the device."""
    torch.manual_seed(0)
    x = torch.randn(batch, length, channels).to(DEVICE, dtype)
    log_decay = -torch.rand(channels, numbers, device=DEVICE)
    b, c = (torch.randn(channels, numbers, device=DEVICE) for _ in range(2))
    h0 = torch.randn(batch, channels, numbers, device=DEVICE)
    reset = None if resets is None else (torch.rand(batch, length) < resets).to(DEVICE)
    return [t.requires_grad_() for t in (x, log_decay, b, c, h0)], reset


def results(leaves, reset, function, **settings):
    """y, h, and the gradients of all leaves in a fixed direction of both."""
    y, h = function(*leaves, reset, **settings)
    generator = torch.Generator().manual_seed(1)
    dy, dh = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, h))
    return [y, h, *torch.autograd.grad((y * dy).sum() + (h * dh).sum(), leaves)]


def relative_error(ours, theirs):
    ours, theirs = (t.detach().double().cpu() for t in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


CASES = {
    "odd sizes": (2, 21, 7, 3, None),
    "whole chunks": (1, 16, 4, 4, None),
    "one token": (2, 1, 3, 2, None),
    "one number": (1, 19, 5, 1, None),
    "documents": (2, 27, 6, 3, 0.15),
    "documents of a token": (1, 11, 2, 2, 1.0),
    "no document begins": (1, 11, 2, 2, 0.0),
    "more numbers than a thread has": (1, 10, 5, 20, 0.2),
}


@pytest.mark.parametrize("name", CASES)
def test_as_defined(name):
    *shape, resets = CASES[name]
    leaves, reset = operands(*shape, resets=resets)
    exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
    ours = results(leaves, reset, diagonal_scan, implementation="triton")
    theirs = results(exact, None if reset is None else reset.cpu(), diagonal_scan_reference)
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors[:2]) < 2e-6, errors
    assert max(errors[2:]) < 4e-6, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_16_bits(dtype):
    """Read as they are, computed in float32; only the gradient of x is rounded."""
    leaves, reset = operands(1, 12, 5, 3, dtype=dtype, resets=0.1)
    ours = results(leaves, reset, diagonal_scan, implementation="triton")
    exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
    theirs = results(exact, reset.cpu(), diagonal_scan_reference)
    assert [t.dtype for t in ours] == [torch.float32] * 2 + [dtype] + [torch.float32] * 4
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert errors.pop(2) < 2**-8
    assert max(errors) < 4e-6, errors


def test_the_same_bits_again():
    leaves, reset = operands(2, 21, 6, 3, resets=0.1)
    first, second = (results(leaves, reset, diagonal_scan, implementation="triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_any_layout():
    (x, *others), _ = operands(2, 13, 5, 3)
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    ours, theirs = (diagonal_scan(t, *others, implementation="triton") for t in (turned, x))
    assert all(map(torch.equal, ours, theirs))


def test_the_future_changes_nothing():
    (x, *others), _ = operands(1, 20, 4, 3)
    later = torch.arange(20, device=DEVICE)[:, None] >= 11
    y, changed = (
        diagonal_scan(t.detach(), *others, implementation="triton")[0] for t in (x, torch.where(later, 1e6 * x, x))
    )
    assert torch.equal(y[:, :11], changed[:, :11])
    assert not torch.equal(y[:, 11:], changed[:, 11:])


def test_operators_keep_their_contract():
    torch.use_deterministic_algorithms(False)
    leaves, reset = operands(1, 9, 3, 2, resets=0.2)
    torch.library.opcheck(torch.ops.attention.diagonal_scan.default, (*leaves, reset, "triton"))


def test_what_the_kernels_cannot_take_is_said(monkeypatch):
    (x, log_decay, b, c, _), _ = operands(1, 3, 2, 65)
    with pytest.raises(ValueError, match=r"implementation: .*up to 64 numbers of a channel, got 65"):
        diagonal_scan(x, log_decay, b, c, implementation="triton")
    small = [t[:, :2].double() for t in (log_decay, b, c)]
    with pytest.raises(ValueError, match=r"implementation: .*got torch\.float64 with torch\.float64"):
        diagonal_scan(x.double(), *small, implementation="triton")
    monkeypatch.setattr(scan_triton, "interpreted", lambda: False)
    small = [t[:, :2].cpu() for t in (log_decay, b, c)]
    with pytest.raises(ValueError, match=r"implementation: .*run on CUDA devices, got cpu .*TRITON_INTERPRET=1"):
        diagonal_scan(x.cpu(), *small, implementation="triton")
