"""The C++ kernels of `attend` for CPUs: float32 against the definition in float64, and what no rounding excuses."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from attention import native
from attention.lifetimes import FOREVER, Lifetimes, causal, window
from attention.ops import attend_native
from attention.ops.attend import attend, attend_reference
from tests.attention.ops.conftest import T

REASON = native.why_not("attend")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def converted(case, dtype):
    def to(x):
        return x if x is None else x.to(dtype)

    gate = None if case.gate is None else tuple(map(to, case.gate))
    return dataclasses.replace(case, q=to(case.q), k=to(case.k), v=to(case.v), key_bias=to(case.key_bias), gate=gate)


def in_float32(case):
    return converted(case, torch.float32)


def results(case, function, dtype, **settings):
    """out, lse and the gradients of all leaves, in a fixed direction."""
    torch.manual_seed(1)
    mine = converted(case, dtype)
    leaves = [leaf.requires_grad_() for leaf in mine.leaves]
    out, lse = mine.call(function, **settings)
    score = (out * torch.randn(out.shape)).sum() + (
        lse.masked_fill(lse == -torch.inf, 0.0) * torch.randn(lse.shape)
    ).sum()
    return out, lse, *torch.autograd.grad(score, leaves, materialize_grads=True)


def assert_is_the_definition(case):
    case = in_float32(case)
    ours = results(case, attend, torch.float32, implementation="native")
    theirs = results(case, attend_reference, torch.float64)
    for mine, exact in zip(ours, theirs, strict=True):
        finite = exact.detach()[exact.isfinite()]
        largest = float(finite.abs().max()) if len(finite) else 1.0
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=2e-6 * max(1.0, largest))


def test_short(drawn):
    assert_is_the_definition(drawn)


def test_long(drawn_long):
    assert_is_the_definition(drawn_long)


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (24, 40), (33, 17), (64, 128), (1, 1)])
def test_widths(dim, value_dim):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 200, dim), torch.randn(2, 2, 200, dim), torch.randn(2, 2, 200, value_dim)
    ours = attend(q, k, v, window(200, 90), implementation="native")
    theirs = attend_reference(q.double(), k.double(), v.double(), window(200, 90))
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=4e-6)


def test_operands_may_be_views():
    """Heads of one projection, values that repeat, gradients that are one number."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 100, 3, 4, 24, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, _ = attend(q[..., ::2], k[..., ::2], v, window(100, 30), implementation="native")
    (ours,) = torch.autograd.grad(out.sum(), qkv)
    out, _ = attend_reference(q[..., ::2].double(), k[..., ::2].double(), v.double(), window(100, 30))
    (theirs,) = torch.autograd.grad(out.sum(), qkv)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_large_logits():
    """A maximum is subtracted, block after block of keys, also where each block has a larger one."""
    torch.manual_seed(0)
    q, v = torch.randn(1, 1, 600, 16), torch.randn(1, 1, 600, 16)
    k = torch.randn(1, 1, 600, 16) * torch.linspace(1, 60, 600)[:, None]
    ours, theirs = (
        attend(q, k, v, causal(600), implementation="native"),
        attend_reference(*(t.double() for t in (q, k, v)), causal(600)),
    )
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_no_bit_depends_on_threads_or_runs(threads, drawn_long):
    case, before = in_float32(drawn_long), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        expected = results(case, attend, torch.float32, implementation="native")
        torch.set_num_threads(threads)
        again = results(case, attend, torch.float32, implementation="native")
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, expected, again))


@pytest.mark.parametrize("middle", [1, 63, 64, 100])
def test_the_future_changes_no_bit_of_the_past(drawn_in_default_time, middle):
    case = in_float32(drawn_in_default_time)
    before = case.call(attend, implementation="native")
    late = case.life.birth.expand(case.k.shape[:3]) >= middle
    for name, fill in (("k", 30.0), ("v", -1e6)):
        setattr(case, name, torch.where(late[..., None], fill, getattr(case, name)))
    case.q = torch.where(torch.arange(T)[:, None] >= middle, -case.q, case.q)
    after = case.call(attend, implementation="native")
    assert all(torch.equal(x[:, :, :middle], y[:, :, :middle]) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("middle", [1, 63, 64, 100])
def test_later_deaths_and_births_change_no_bit_of_the_past(drawn_with_lists, middle):
    case = in_float32(drawn_with_lists)
    before = case.call(attend, implementation="native")
    birth, death = (x.expand(case.k.shape[:3]) for x in (case.life.birth, case.life.death))
    later = torch.randint(middle, 400, death.shape, dtype=torch.int32)
    birth = torch.where((birth >= middle) & (later % 2 == 0), FOREVER, birth)
    case.life = Lifetimes(birth, torch.where(death >= middle, later, death))
    after = case.call(attend, implementation="native")
    assert all(torch.equal(x[:, :, :middle], y[:, :, :middle]) for x, y in zip(before, after, strict=True))


def test_a_number_that_is_none_shows():
    q, k, v = torch.randn(3, 1, 1, 100, 16).unbind()
    k[0, 0, 50] = torch.nan
    out, lse = attend(q, k, v, window(100, 10), implementation="native")
    hit = torch.zeros(100, dtype=torch.bool)
    hit[50:60] = True
    assert torch.equal(out.isnan().any(-1)[0, 0], hit)
    assert torch.equal(lse.isnan()[0, 0], hit)


@pytest.mark.parametrize("of_key", [True, False])
def test_a_share_that_is_no_number_shows(of_key):
    """To the queries that meet the key, or to the query whose threshold it is, and to nobody else."""
    q, k, v = torch.randn(3, 1, 1, 100, 16).unbind()
    u, tau = torch.ones(1, 1, 100), torch.zeros(1, 1, 100)
    (u if of_key else tau)[0, 0, 50] = torch.nan
    out, _ = attend(q, k, v, window(100, 10), gate=(u, tau), implementation="native")
    assert out.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == list(range(50, 60 if of_key else 51))


def test_float32_on_a_cpu_takes_them(monkeypatch):
    called = []
    monkeypatch.setattr(attend_native, "_run", lambda name, *args, **more: called.append(name))
    q = torch.randn(1, 1, 40, 16)
    attend(q, q, q, window(40, 9))
    attend(q.double(), q.double(), q.double(), window(40, 9))
    attend(q, q, q, window(40, 9), implementation="torch")
    assert called == ["attend_forward"]


@pytest.mark.parametrize("long", [40, 41])
def test_long_segments_go_to_the_fused_kernel(long, monkeypatch):
    called = []
    monkeypatch.setattr(attend_native, "LONG", long)
    monkeypatch.setattr(attend_native, "_run", lambda name, *args, **more: called.append(name))
    q = torch.randn(1, 1, 40, 16)
    attend(q, q, q, causal(40))
    assert called == ([] if long == 40 else ["attend_forward"])


def test_other_types_are_told():
    q = torch.randn(1, 1, 40, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"C\+\+ kernels take float32 on a CPU, got torch.float64"):
        attend(q, q, q, window(40, 9), implementation="native")


SCRIPT = """
import torch
from attention import native
from attention.lifetimes import window
from attention.ops.attend import attend
q = torch.randn(1, 1, 40, 16)
print(tuple(attend(q, q, q, window(40, 9))[0].shape))
print(native.why_not("attend"))
try:
    attend(q, q, q, window(40, 9), implementation="native")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LMTRAIN_NATIVE", "0", "switched off by LMTRAIN_NATIVE=0"),
        ("CXX", "no-such-compiler", "no-such-compiler is not on this machine"),
        ("CXX", "false", "cannot be compiled by"),
        ("XDG_CACHE_HOME", "/dev/null", "cannot be kept: "),
    ],
)
def test_without_them_torch_computes_and_the_reason_is_told(variable, value, expected, tmp_path):
    settings = {"XDG_CACHE_HOME": str(tmp_path), variable: value}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **settings}, capture_output=True, text=True, check=True
    )
    shape, reason, error = done.stdout.splitlines()
    assert shape == "(1, 1, 40, 16)"
    assert expected in reason
    assert expected in error


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.folder().mkdir(parents=True)
    native.folder().chmod(0o777)
    with pytest.raises(native.UnavailableError, match="others may write there"):
        native.library.__wrapped__("attend")


def test_a_user_without_a_home_is_told(monkeypatch):
    def nowhere():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(native, "folder", nowhere)
    with pytest.raises(native.UnavailableError, match="could not determine home directory; set XDG_CACHE_HOME"):
        native.library.__wrapped__("attend")


def test_empty_lists():
    q, k = torch.randn(1, 1, 5, 16), torch.randn(1, 1, 3, 16)
    nobody = Lifetimes(torch.full((3,), 9, dtype=torch.int32), torch.full((3,), 12, dtype=torch.int32))
    out, lse = attend(q, k, k, nobody, implementation="native")
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
