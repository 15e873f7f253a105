"""The Triton kernels of `attend` against its definition: in the interpreter, or on the GPU if there is one.

The interpreter shows what is computed, not how: no races, no alignment, no registers. (Those are for the compile
check and the GPU.) It multiplies bfloat16 wrongly, so that type is tested on GPUs alone.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attention.kernels import plan
from attention.kernels.configs import Config
from attention.lifetimes import FOREVER, Lifetimes, causal, window
from attention.ops import attend_triton
from attention.ops.attend import attend, attend_reference
from tests.attention.ops.conftest import CASES, Case, case, ints, random

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of masked scores


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles in few tokens, of another shape in each kernel; a GPU keeps the tiles that it will use."""
    use_tiles(monkeypatch, two_loops=True)


def use_tiles(monkeypatch, two_loops, everywhere=False):
    tiles = {"forward": (32, 16), "query_gradient": (32, 32), "key_gradient": (16, 32)}
    if INTERPRETED or everywhere:
        monkeypatch.setattr(attend_triton, "find_config", lambda name, *_, **__: Config(*tiles[name], 4, 1, two_loops))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What a kernel leaves unwritten is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def moved(drawn: Case, dtype: torch.dtype, device: str) -> Case:
    """The case in another type; bias and gate in at least float32, as `attend` wants them."""
    wide = torch.promote_types(dtype, torch.float32)

    def to(t, kind):
        return None if t is None else t.detach().to(device, kind)

    life = drawn.life
    return replace(
        drawn,
        q=to(drawn.q, dtype),
        k=to(drawn.k, dtype),
        v=to(drawn.v, dtype),
        life=Lifetimes(*(to(t, torch.int32) for t in (life.birth, life.death, life.generation))),
        time=to(drawn.time, torch.int32),
        key_bias=to(drawn.key_bias, wide),
        gate=None if drawn.gate is None else (to(drawn.gate[0], wide), to(drawn.gate[1], wide)),
    )


def results(drawn: Case, function, **settings):
    """out, lse, and the gradients of all leaves in a fixed direction of both."""
    for leaf in drawn.leaves:
        leaf.requires_grad_()
    out, lse = drawn.call(function, **settings)
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, lse))
    score = (out * dout).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse).sum()
    return [out, lse, *torch.autograd.grad(score, drawn.leaves, materialize_grads=True)]


def relative_error(ours, theirs):
    """L2, over what is finite; infinities must agree."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert torch.equal(ours[~finite], theirs[~finite])
    norm = theirs[finite].norm()
    return float((ours - theirs)[finite].norm() / norm) if norm else float(ours[finite].norm())


def assert_as_defined(drawn: Case, dtype=torch.float32, outputs=2e-6, gradients=4e-6):
    given = moved(drawn, dtype, DEVICE)
    exact = moved(given, torch.float64, "cpu")
    ours, theirs = results(given, attend, implementation="triton"), results(exact, attend_reference)
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors[:2]) < outputs, errors
    assert max(errors[2:]) < gradients, errors
    return ours


def test_every_pattern(drawn):
    assert_as_defined(drawn)


@pytest.mark.parametrize("name", ["causal", "s2", "sparse fixed", "padded queries", "gated", "random deaths", "chunk"])
def test_one_loop(name, monkeypatch):
    use_tiles(monkeypatch, two_loops=False)
    torch.manual_seed(0)
    assert_as_defined(CASES[name]())


def wide_heads(dim, value_dim):
    torch.manual_seed(0)
    return case(window(50, 20), queries=50, dim=dim, value_dim=value_dim, heads=2, kv_heads=1)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (40, 24), (16, 128), (128, 20), (256, 256), (5, 3)])
def test_widths(dim, value_dim):
    assert_as_defined(wide_heads(dim, value_dim))


def test_float16():
    assert_as_defined(wide_heads(64, 64), torch.float16, outputs=2e-3, gradients=2e-3)


def test_bfloat16():
    """In the interpreter this says that types are carried, no more: products are made in float32 there."""
    ours = assert_as_defined(wide_heads(64, 64), torch.bfloat16, outputs=5e-3, gradients=1e-2)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 3]


def hubs():
    """Two keys that everybody meets for ever, among keys of a short life: in a generation of their own."""
    token = torch.arange(200)
    hub = token % 100 == 3
    life = ints(token, torch.where(hub, FOREVER, token + 9), hub)
    bias, gate = random(2, 200), (random(2, 2, 200) + 1, random(2, 4, 200) - 1)
    return case(life, queries=200, bias=bias, gate=gate)


def test_long_runs_in_segments(monkeypatch):
    torch.manual_seed(0)
    use_tiles(monkeypatch, two_loops=True, everywhere=True)
    drawn = hubs()
    whole = assert_as_defined(drawn)
    monkeypatch.setattr(plan, "PROGRAMS", 64)
    monkeypatch.setattr(plan, "SHORTEST_SEGMENT", 2)
    life = moved(drawn, torch.float32, DEVICE).life
    made = plan.Plan(life, torch.arange(200, dtype=torch.int32, device=DEVICE), kv_heads=2, num_keys=200)
    work = made.key_tiles(16, 32, batch=2, heads=4)
    assert int(work.tiles[..., 3].max()) > 2
    monkeypatch.setattr(attend_triton, "find_plan", lambda *_: made)
    parts = assert_as_defined(drawn)
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], parts[:3], strict=True))
    assert not torch.equal(whole[3], parts[3])  # the sum in another order: the split was there


@pytest.mark.parametrize("name", ["s2", "gated lists", "random deaths"])
def test_the_same_bits_again(name):
    torch.manual_seed(0)
    drawn = moved(CASES[name](), torch.float32, DEVICE)
    first, second = (results(drawn, attend, implementation="triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_generations_change_no_result():
    """Whatever the split, also one that is no use; only sums are made in another order."""
    torch.manual_seed(0)
    drawn = CASES["s2"]()
    split = torch.randint(0, 7, drawn.life.birth.shape, dtype=torch.int32)
    assert_as_defined(replace(drawn, life=Lifetimes(drawn.life.birth, drawn.life.death, split)))


def test_any_layout():
    """Heads behind tokens, features in front of them, keys expanded, gradients expanded."""
    torch.manual_seed(0)
    drawn = moved(case(window(40, 9), queries=40), torch.float32, DEVICE)
    q = drawn.q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k = drawn.k.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    v = drawn.v[:, :1].expand_as(drawn.v).requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(q, k, v, drawn.life, **more)[0].sum(), (q, k, v))
        for f, more in ((attend, {"implementation": "triton"}), (attend_reference, {}))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("stride", [2**23, 2**23 + 16], ids=["read in place", "copied"])
def test_rows_far_apart_in_memory(stride):
    """Beyond 2^31 elements, where 32-bit offsets would wrap around."""
    torch.use_deterministic_algorithms(False)  # nobody writes all of this
    try:
        storage = torch.empty(300 * stride, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"needs 5 GiB of address space: {error}")
    torch.manual_seed(0)
    far = storage.as_strided((1, 1, 300, 16), (0, 0, stride, 1))
    near = torch.randn(1, 1, 300, 16, device=DEVICE).half()
    far.copy_(near)
    q = torch.randn(1, 1, 9, 16, device=DEVICE).half()
    time = torch.arange(291, 300, dtype=torch.int32, device=DEVICE)
    life = Lifetimes(*(t.to(DEVICE) for t in (causal(300).birth, causal(300).death)))
    with torch.no_grad():
        ours, theirs = (attend(q, k, k, life, time=time, implementation="triton") for k in (far, near))
    assert all(map(torch.equal, ours, theirs))


def operands():
    torch.manual_seed(0)
    return [torch.randn(1, h, 40, 16, device=DEVICE, requires_grad=True) for h in (2, 1, 1)]


def step(q, k, v):
    token = torch.arange(40, dtype=torch.int32, device=q.device)
    out, lse = attend(2 * q, k, v, Lifetimes(token, token + 9), implementation="triton")
    return (out * out).sum() + lse.sum()


def test_compiles_as_one_graph():
    tensors = operands()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, step))
    assert all(map(torch.equal, ours, theirs))


def test_activation_checkpointing():
    tensors = operands()
    plain = torch.autograd.grad(step(*tensors), tensors)
    again = torch.autograd.grad(checkpoint(step, *tensors, use_reentrant=False), tensors)
    assert all(map(torch.equal, plain, again))


def test_operators_keep_their_contract():
    torch.use_deterministic_algorithms(False)
    q, k, v = operands()
    token = torch.arange(40, dtype=torch.int32, device=DEVICE)
    given = (q, k, v, token, token + 9, token % 2, None, None, None, None)
    torch.library.opcheck(torch.ops.attention.attend.default, (*given, 0.3, "triton"))
    out, lse = torch.ops.attention.attend(*given, 0.3, "triton")
    saved = [None if t is None else t.detach() for t in (*given, out, lse)]
    given = (saved[-2], saved[-1], *saved, 0.3, "triton")
    for fixed in (0, 2):
        torch.library.opcheck(torch.ops.attention.attend_backward.default, (*given, True, fixed))
    (_, all_of_dk, _), (_, dk, _) = (torch.ops.attention.attend_backward(*given, True, fixed) for fixed in (0, 2))
    assert torch.equal(dk, all_of_dk[..., :-2])


def test_lifetimes_may_change_in_place_between_calls():
    q, k, v = (t.detach() for t in operands())
    life = Lifetimes(*(t.to(DEVICE) for t in (window(40, 9).birth, window(40, 9).death)))
    attend(q, k, v, life, implementation="triton")
    life.death.sub_(3)
    torch.testing.assert_close(attend(q, k, v, life, implementation="triton"), attend_reference(q, k, v, life))


def test_lifetimes_of_inference_mode_may_change_too():
    q, k, v = (t.detach() for t in operands())
    with torch.inference_mode():
        life = Lifetimes(*(t.to(DEVICE).clone() for t in (window(40, 9).birth, window(40, 9).death)))
        attend(q, k, v, life, implementation="triton")
        life.death.sub_(3)
        torch.testing.assert_close(attend(q, k, v, life, implementation="triton"), attend_reference(q, k, v, life))


def test_plans_are_made_once_and_die_with_their_lifetimes():
    q, k, v = (t.detach() for t in operands())
    before = len(attend_triton._plans)
    life = Lifetimes(*(t.to(DEVICE) for t in (window(40, 9).birth, window(40, 9).death)))
    for _ in range(2):
        attend(q, k, v, life, implementation="triton")
    assert len(attend_triton._plans[life.birth]) == 1
    assert len(attend_triton._plans) == before + 1
    del life
    assert len(attend_triton._plans) == before


def test_what_the_kernels_cannot_take_is_said(monkeypatch):
    q, k, v = (t.detach() for t in operands())
    life = Lifetimes(*(t.to(DEVICE) for t in (causal(40).birth, causal(40).death)))
    with pytest.raises(ValueError, match=r"implementation: .*float32, bfloat16 or float16, got torch\.float64"):
        attend(q.double(), k.double(), v.double(), life, implementation="triton")
    with pytest.raises(ValueError, match=r"implementation: .*heads up to 256 wide, got 272"):
        attend(q, k, v.repeat(1, 1, 1, 17), life, implementation="triton")
    monkeypatch.setattr(attend_triton, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"implementation: .*run on CUDA devices, got cpu .*TRITON_INTERPRET=1"):
        attend(*(t.cpu() for t in (q, k, v)), causal(40), implementation="triton")
