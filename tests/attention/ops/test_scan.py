"""`diagonal_scan`: the chunked path against the recurrence, gradients included; what it may and may not depend on."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attention.ops import scan_torch
from attention.ops.scan import diagonal_scan, diagonal_scan_reference
from lmtrain.bench.measure import peak_bytes

LENGTHS = [0, 1, 5, 63, 64, 65, 150]
RESETS = {"one document": None, "none begins": 0.0, "some": 0.02, "many": 0.4, "every token": 1.0}


def operands(length, batch=2, channels=5, numbers=3, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(batch, length, channels, dtype=dtype)
    log_decay = -torch.rand(channels, numbers, dtype=dtype)
    b, c = torch.randn(2, channels, numbers, dtype=dtype).unbind()
    h0 = torch.randn(batch, channels, numbers, dtype=dtype)
    return [t.requires_grad_() for t in (x, log_decay, b, c, h0)]


def resets(share, length, batch=2):
    torch.manual_seed(1)
    return None if share is None else torch.rand(batch, length) < share


def results(leaves, reset, function):
    """y, h, and the gradients of all leaves in a fixed direction of both."""
    y, h = function(*leaves, reset)
    torch.manual_seed(2)
    score = (y * torch.randn_like(y)).sum() + (h * torch.randn_like(h)).sum()
    return [y, h, *torch.autograd.grad(score, leaves, materialize_grads=True)]


def assert_as_defined(leaves, reset):
    for ours, theirs in zip(
        *(results(leaves, reset, f) for f in (diagonal_scan, diagonal_scan_reference)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("share", RESETS.values(), ids=RESETS.keys())
def test_as_defined(length, share):
    assert_as_defined(operands(length), resets(share, length))


@pytest.mark.parametrize("share", [None, 0.05, 0.5])
@pytest.mark.parametrize("at_once", [1, 3])
def test_few_chunks_at_a_time(share, at_once, monkeypatch):
    """Long rows are computed part by part; the gradients of the parameters are sums over them."""
    monkeypatch.setattr(scan_torch, "CHUNK", 8)
    monkeypatch.setattr(scan_torch, "AT_ONCE", 0)
    monkeypatch.setattr(scan_torch, "FEWEST", 2 * at_once)
    assert_as_defined(operands(75), resets(share, 75))


def test_a_document_of_each_place_in_a_chunk():
    for begin in range(10):
        reset = torch.zeros(1, 10, dtype=torch.bool)
        reset[0, begin] = True
        assert_as_defined(operands(10, batch=1), reset)


def test_by_hand():
    """Two tokens, q = 1/2: h = 3 x_0, then 3 x_0 / 2 + 3 x_1; y = 5 h."""
    x = torch.tensor([[[2.0], [7.0]]])
    half, three, five = (torch.tensor([[v]]) for v in (0.5, 3.0, 5.0))
    y, h = diagonal_scan(x, half.log(), three, five)
    assert y.flatten().tolist() == [30.0, 120.0]
    assert h.item() == 24.0


@pytest.mark.parametrize("share", [None, 0.1])
def test_in_pieces_with_what_was_before(share):
    """Gradients flow through the h that one call hands to the next."""
    leaves, reset = operands(150), resets(share, 150)

    def pieces(x, log_decay, b, c, h, reset):
        parts = []
        for begin, end in ((0, 1), (1, 70), (70, 70), (70, 150)):
            part = None if reset is None else reset[:, begin:end]
            y, h = diagonal_scan(x[:, begin:end], log_decay, b, c, h, part)
            parts.append(y)
        return torch.cat(parts, 1), h

    for ours, theirs in zip(*(results(leaves, reset, f) for f in (pieces, diagonal_scan)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("share", [None, 0.05])
@pytest.mark.parametrize("factor", [1e3, 1e6])
@pytest.mark.parametrize("cut", [1, 64, 100, 149])
def test_the_future_changes_no_bit_of_the_past(share, factor, cut):
    x, *others = (t.detach() for t in operands(150, dtype=torch.float32))
    reset = resets(share, 150)
    later = torch.where(torch.arange(150)[:, None] >= cut, factor * x, x)
    y, changed = (diagonal_scan(t, *others, reset)[0] for t in (x, later))
    assert torch.equal(y[:, :cut], changed[:, :cut])
    assert not torch.equal(y[:, cut:], changed[:, cut:])


def test_documents_do_not_see_each_other():
    """Not even what is no number comes across, or back."""
    x, *others = (t.detach() for t in operands(150, batch=1))
    reset = torch.zeros(1, 150, dtype=torch.bool)
    reset[0, [30, 40, 100]] = True
    y, h = diagonal_scan(x, *others, reset)
    x[0, 35:40] = torch.inf
    broken, h_broken = diagonal_scan(x, *others, reset)
    assert torch.equal(broken[:, :30], y[:, :30])
    assert torch.equal(broken[:, 40:], y[:, 40:])
    assert torch.equal(h_broken, h)
    assert not broken[:, 35:40].isfinite().any()


def test_at_least_float32():
    """Decays that bfloat16 would round to 1 or to one another; also under autocast."""
    x, _, b, c, h0 = (t.detach().float() for t in operands(150))
    log_decay = torch.full_like(b, -1e-3)
    exact = [t.double() for t in (x.bfloat16(), log_decay, b, c, h0)]
    y, h = diagonal_scan_reference(*exact)
    with torch.autocast("cpu", torch.bfloat16):
        ours = diagonal_scan(x.bfloat16(), log_decay, b, c, h0)
    assert [t.dtype for t in ours] == [torch.float32] * 2
    assert float((ours[0] - y).norm() / y.norm()) < 1e-6
    assert float((ours[1] - h).norm() / h.norm()) < 1e-6


def test_gradients_under_autocast_are_those_without():
    leaves = operands(70, dtype=torch.float32)
    plain = results(leaves, None, diagonal_scan)
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(leaves, None, diagonal_scan)
    assert all(map(torch.equal, plain, cast))


def test_a_decay_of_zero():
    """exp(-inf) is 0, and its gradients are numbers: y depends on its own token alone."""
    x, log_decay, b, c, h0 = operands(70)
    with torch.no_grad():
        log_decay[:, 0] = -torch.inf
        log_decay[0] = -torch.inf
    found = results([x, log_decay, b, c, h0], None, diagonal_scan)
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found[0][..., 0], x[..., 0] * (b * c).sum(1)[0])


def test_the_same_bits_again():
    leaves, reset = operands(150, dtype=torch.float32), resets(0.05, 150)
    assert all(map(torch.equal, *(results(leaves, reset, diagonal_scan) for _ in range(2))))


def test_gradcheck():
    leaves, reset = operands(7), resets(0.3, 7)
    assert torch.autograd.gradcheck(lambda *t: diagonal_scan(*t, reset), leaves)


def test_only_what_is_asked_for():
    """A gradient through y or h alone, of one operand alone."""
    leaves = operands(70)
    for part in (0, 1):
        for leaf in leaves:
            ours, theirs = (
                torch.autograd.grad(f(*leaves)[part].sum(), leaf, allow_unused=True, materialize_grads=True)[0]
                for f in (diagonal_scan, diagonal_scan_reference)
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


def test_activation_checkpointing():
    leaves, reset = operands(70, dtype=torch.float32), resets(0.1, 70)

    def again(*operands):
        return checkpoint(diagonal_scan, *operands, use_reentrant=False)

    assert all(map(torch.equal, *(results(leaves, reset, f) for f in (diagonal_scan, again))))


@pytest.mark.parametrize("share", [None, 0.1])
def test_operators_keep_their_contract(share):
    leaves, reset = operands(9), resets(share, 9)
    torch.library.opcheck(torch.ops.attention.diagonal_scan.default, (*leaves, reset, "torch"))
    saved = [t.detach() for t in leaves]
    torch.library.opcheck(
        torch.ops.attention.diagonal_scan_backward.default, (saved[0], saved[-1], *saved, reset, "torch")
    )


@pytest.mark.parametrize("length", [1, 65])
def test_flops_are_those_of_the_recurrence(length):
    leaves = operands(length)
    with FlopCounterMode(display=False) as forward:
        y, _ = diagonal_scan(*leaves)
    assert forward.get_total_flops() == 6 * 2 * length * 5 * 3
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 12 * 2 * length * 5 * 3


@pytest.mark.parametrize("share", [None, 0.02, 0.5])
def test_memory_is_linear(share):
    """Twice the tokens, twice the bytes, whatever the documents; far from a state per token."""
    peaks = []
    for length in (2048, 4096):
        leaves = operands(length, batch=1, channels=8, numbers=16, dtype=torch.float32)
        reset = resets(share, length, batch=1)
        peaks.append(peak_bytes(lambda leaves=leaves, reset=reset: results(leaves, reset, diagonal_scan)))
    assert peaks[1] < 2.2 * peaks[0]
    states = 4096 * 8 * 16 * 4
    assert peaks[1] < (2 if share is None else 5) * states


def test_short_documents_make_short_chunks():
    """Pieces take room for whole chunks: where every token begins a document they must be few times its own."""
    assert scan_torch._chunk_length(None) == scan_torch._chunk_length(resets(0.0, 1000)) == scan_torch.CHUNK
    assert scan_torch._chunk_length(resets(1.0, 1000)) == scan_torch.SHORTEST
    assert scan_torch.SHORTEST < scan_torch._chunk_length(resets(0.1, 1000)) < scan_torch.CHUNK


MISTAKES = {
    "no channels": (lambda a: {"x": a["x"][0]}, r"x: expected floating \[batch, tokens, channels\].*\(4, 5\)"),
    "integers": (lambda a: {"x": a["x"].int()}, "x: expected floating .*int32"),
    "decays of other channels": (lambda a: {"log_decay": a["log_decay"][1:]}, r"log_decay: expected shape \[5, n\]"),
    "another n": (lambda a: {"b": a["b"][:, 1:]}, r"b: expected shape \(5, 3\), got \(5, 2\)"),
    "a c per token": (lambda a: {"c": a["x"]}, r"c: expected shape \(5, 3\), got \(2, 4, 5\)"),
    "an h of another batch": (lambda a: {"h0": a["h0"][:1]}, r"h0: expected shape \(2, 5, 3\), got \(1, 5, 3\)"),
    "resets as numbers": (lambda a: {"reset": torch.zeros(2, 4)}, r"reset: expected bool \[2, 4\], got torch.float32"),
    "another device": (lambda a: {"b": a["b"].to("meta")}, "b: expected device cpu as x's, got meta"),
    "an unknown implementation": (lambda a: {"implementation": "fft"}, "implementation: .*'reference'.*'fft'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    change, message = MISTAKES[mistake]
    given = dict(zip(("x", "log_decay", "b", "c", "h0"), operands(4), strict=True))
    with pytest.raises(ValueError, match=message):
        diagonal_scan(**(given | change(given)))
