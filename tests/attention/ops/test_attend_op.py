"""`attend` as a citizen of torch: types, layouts, compile, checkpointing, autocast, FLOP counts, clear mistakes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attention.lifetimes import FOREVER, Lifetimes, causal, living_pairs, window
from attention.ops.attend import attend, attend_reference
from attention.ops.attend_operands import Operands
from attention.ops.attend_route import find_route


def qkv(*, batch=2, heads=4, kv_heads=2, length=70, dim=8, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (heads, length), (kv_heads, length), (kv_heads, length)
    return [torch.randn(batch, h, n, dim, dtype=dtype, requires_grad=True) for h, n in shapes]


def lists(length):
    """A pattern whose keys are no slices."""
    tokens = torch.arange(length)
    return Lifetimes(tokens.int(), torch.where(tokens % 5 == 0, FOREVER, tokens + 9).int())


PATTERNS = {"causal": causal, "window": lambda n: window(n, 9), "lists": lists}


@pytest.fixture(params=PATTERNS)
def pattern(request):
    return PATTERNS[request.param]


def optional_operands(length):
    torch.manual_seed(1)
    bias = torch.randn(2, length, dtype=torch.float64, requires_grad=True)
    u = torch.randn(2, 2, length, dtype=torch.float64, requires_grad=True)
    tau = torch.randn(2, 4, length, dtype=torch.float64, requires_grad=True)
    return bias, u, tau


def test_gradcheck(pattern):
    q, k, v = qkv(length=7, dim=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, pattern(7)), (q, k, v))


def test_gradcheck_of_bias_and_gate():
    q, k, v = qkv(length=6, dim=3, dtype=torch.float64)
    bias, u, tau = optional_operands(6)

    def call(q, k, v, bias, u, tau):
        return attend(q, k, v, causal(6), key_bias=bias, gate=(u, tau - 3))

    assert torch.autograd.gradcheck(call, (q, k, v, bias, u, tau))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("gated", [False, True])
def test_operators_keep_their_contract(pattern, gated):
    q, k, v = qkv(dtype=torch.float64)
    life, optional = pattern(70), optional_operands(70) if gated else (None, None, None)
    operands = (q, k, v, life.birth, life.death, None, None, *optional)
    torch.library.opcheck(torch.ops.attention.attend.default, (*operands, 0.3, "torch"))
    out, lse = torch.ops.attention.attend(*operands, 0.3, "torch")
    saved = [None if t is None else t.detach() for t in (*operands, out, lse)]
    given = (saved[-2], saved[-1], *saved, 0.3, "torch")
    for fixed in (0, 2, q.shape[-1]):
        torch.library.opcheck(torch.ops.attention.attend_backward.default, (*given, True, fixed))


@pytest.mark.usefixtures("small_parts")
def test_columns_of_keys_without_gradient(pattern):
    """The other gradients are those of a call that computes it."""
    q, k, v = (t.detach() for t in qkv(dtype=torch.float64))
    life = pattern(70)
    operands = (q, k, v, life.birth, life.death, None, None, None, None, None)
    out, lse = torch.ops.attention.attend(*operands, 0.3, "torch")
    given = (out.cos(), lse.sin(), *operands, out, lse, 0.3, "torch", True)
    expected = torch.ops.attention.attend_backward(*given)
    for fixed in (1, q.shape[-1]):
        dq, dk, dv = torch.ops.attention.attend_backward(*given, fixed)
        assert torch.equal(dq, expected[0])
        assert torch.equal(dv, expected[2])
        torch.testing.assert_close(dk, expected[1][..., : q.shape[-1] - fixed], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(pattern, backend):
    q, k, v = qkv(dtype=torch.float64)

    def step(q, k, v):
        out, lse = attend(2 * q, k, v, pattern(k.shape[2]), time=torch.arange(70, dtype=torch.int32))
        return (out * out).sum() + lse.sum()

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, step))
    assert all(map(torch.equal, ours, theirs))


def test_activation_checkpointing(pattern):
    q, k, v = qkv()

    def step(q, k, v):
        return attend(q, k, v, pattern(70))[0]

    plain = torch.autograd.grad(step(q, k, v).sum(), (q, k, v))
    again = torch.autograd.grad(checkpoint(step, q, k, v, use_reentrant=False).sum(), (q, k, v))
    assert all(map(torch.equal, plain, again))


def test_who_meets_nobody_passes_no_gradient_on():
    q, k, v = qkv(length=40)
    late = Lifetimes(torch.full((40,), 20, dtype=torch.int32), torch.full((40,), FOREVER, dtype=torch.int32))
    _, lse = attend(q, k, v, late)
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), torch.full_like(lse, torch.inf).where(lse.isinf(), 1.0))
    assert torch.equal(dq[:, :, :20], torch.zeros_like(dq[:, :, :20]))
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.usefixtures("small_parts")
def test_autocast_rounds_nothing(pattern):
    q, k, v = qkv()
    plain = attend(q, k, v, pattern(70))
    with torch.autocast("cpu", torch.bfloat16):
        cast = attend(q, k, v, pattern(70))
    assert all(map(torch.equal, plain, cast))


def test_first_in_inference_mode_then_in_training(pattern):
    q, k, v = qkv(length=75)
    with torch.inference_mode():
        early = attend(q, k, v, pattern(75))
    late = attend(q, k, v, pattern(75))
    late[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(early, late, strict=True))


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_types(pattern, dtype, tolerance, with_lse):
    operands = [x.detach().to(dtype).requires_grad_() for x in qkv()]
    exact = [x.detach().double().requires_grad_() for x in operands]
    out, lse = attend(*operands, pattern(70))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    true_out, true_lse = attend_reference(*exact, pattern(70))
    ours = torch.autograd.grad(out.float().sum() + with_lse * lse.sum(), operands)
    theirs = torch.autograd.grad(true_out.sum() + with_lse * true_lse.sum(), exact)
    for mine, other in zip((out, lse, *ours), (true_out, true_lse, *theirs), strict=True):
        scale = max(1.0, other.abs().max().item())
        assert (mine.double() - other).abs().max() <= tolerance * scale
    assert all(g.dtype == dtype for g in ours)


def test_any_layout(pattern):
    """Heads behind tokens, expanded keys, expanded gradients: as projections and sums leave them."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv())
    shared = k[:, :1].expand_as(k)
    out, _ = attend(q, shared, v, pattern(70))
    dense, _ = attend_reference(q, shared, v, pattern(70))
    torch.testing.assert_close(out, dense)
    ours, theirs = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, dense))
    torch.testing.assert_close(ours, theirs)


def test_features_in_any_stride(pattern):
    q, k, v = (x.detach().transpose(2, 3).contiguous().transpose(2, 3) for x in qkv())
    torch.testing.assert_close(attend(q, k, v, pattern(70)), attend_reference(q, k, v, pattern(70)))


def test_lifetimes_may_change_in_place_between_calls():
    q, k, v = qkv()
    life = window(70, 9)
    attend(q, k, v, life)
    life.death.sub_(3)
    torch.testing.assert_close(attend(q, k, v, life), attend_reference(q, k, v, life))


def test_scale():
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, window(70, 9), scale=0.5), attend(q * 0.5 * 8**0.5, k, v, window(70, 9)))


def test_causal_is_that_of_torch():
    q, k, v = qkv(kv_heads=4)
    ours = attend(q, k, v, causal(70))[0]
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("value_dim", [8, 5])
def test_flops_are_those_of_the_living_pairs(pattern, value_dim):
    q, k, v = qkv()
    v = v[..., :value_dim]
    life = pattern(70)
    pairs = 2 * 4 * int(life.alive(torch.arange(70)).sum())
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "num_queries": 70, "num_keys": 70}
    assert living_pairs(life, **sizes) == pairs
    with FlopCounterMode(display=False) as forward:
        out, _ = attend(q, k, v, life)
    assert forward.get_total_flops() == 2 * (8 + value_dim) * pairs
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * (3 * 8 + 2 * value_dim) * pairs


@pytest.mark.parametrize(("value_dim", "fused"), [(2, False), (3, True), (15, True), (16, False)])
def test_the_fused_kernel_is_not_fed_with_zeros(value_dim, fused):
    """It wants keys of 8 as wide as values: where half of a key, or two thirds of a value, would be padding, the loop
    is faster."""
    q, k, v = (t.detach() for t in qkv())
    route = find_route(Operands(q, k, v.repeat(1, 1, 1, 2)[..., :value_dim], None, None, None, 1.0), causal(70), None)
    assert (route.segments is not None) == fused


MISTAKES = {
    "a q of three dimensions": (lambda a: {"q": a["q"][0]}, r"q: expected \[batch, heads, items, width\]"),
    "mixed types": (lambda a: {"k": a["k"].double()}, "k: expected one floating type.*float64"),
    "integers": (lambda a: {n: a[n].int() for n in "qkv"}, "q: expected one floating type.*int32"),
    "another width": (lambda a: {"k": a["k"][..., 1:]}, r"k: expected shape \[2, kv_heads, keys, 8\].*\(2, 2, 9, 7\)"),
    "another batch": (lambda a: {"k": a["k"][:1]}, "k: expected shape"),
    "another number of values": (lambda a: {"v": a["v"][:, :, 1:]}, r"v: expected shape \[2, 2, 9, width\]"),
    "heads that do not divide": (lambda a: {"q": a["q"][:, :3]}, "q: expected heads in a multiple of the 2"),
    "too many lifetimes": (lambda a: {"life": causal(10)}, r"life.birth: .*broadcastable to \(2, 2, 9\).*\(10,\)"),
    "float times": (lambda a: {"time": torch.arange(9.0)}, "time: expected type torch.int32, got torch.float32"),
    "times of another length": (lambda a: {"time": torch.arange(8).int()}, "time: .*broadcastable"),
    "a bias per query": (lambda a: {"key_bias": torch.zeros(2, 4, 9)}, r"key_bias: .*\(2, 2, 9\).*\(2, 4, 9\)"),
    "a bias in float64": (lambda a: {"key_bias": torch.zeros(9).double()}, "key_bias: expected type torch.float32"),
    "a u per query head": (
        lambda a: {"gate": (torch.zeros(2, 4, 9), torch.zeros(2, 4, 9))},
        r"gate\[0\] \(u\): .*\(2, 4, 9\)",
    ),
    "a tau per key head": (
        lambda a: {"gate": (torch.zeros(2, 2, 9), torch.zeros(2, 2, 9))},
        r"gate\[1\] \(tau\): .*\(2, 2, 9\)",
    ),
    "another device": (lambda a: {"v": a["v"].to("meta")}, "v: expected device cpu as q's, got meta"),
    "an unknown implementation": (lambda a: {"implementation": "cuda"}, "implementation: .*'reference'.*'cuda'"),
    "times that fall": (lambda a: {"time": torch.arange(9).flip(0).int()}, "time: expected ascending"),
    "a generation per query": (
        lambda a: {"life": Lifetimes(causal(9).birth, causal(9).death, torch.zeros(8).int())},
        r"life.generation: .*broadcastable to \(2, 2, 9\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    change, message = MISTAKES[mistake]
    q, k, v = qkv(length=9)
    given = {"q": q, "k": k, "v": v, "life": causal(9)}
    given |= change(given)
    with pytest.raises(ValueError, match=message):
        attend(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("life"), **given)
