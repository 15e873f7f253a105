"""Merging attention over disjoint key sets."""

import pytest
import torch

from attention.lifetimes import FOREVER, Lifetimes, causal, window
from attention.ops.attend import attend, attend_reference
from attention.ops.merge import merge


def parts_of(q, k, v, function=attend):
    """A window, and all that is older."""
    near = window(k.shape[2], 5)
    far = Lifetimes(near.death, torch.full_like(near.death, FOREVER))
    return [function(q, k, v, near), function(q, k, v, far)]


def test_window_and_the_older_make_dense():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, lse = merge(parts_of(q, k, v))
    dense, dense_lse = attend_reference(q, k, v, causal(40))
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, dense_lse, rtol=0, atol=1e-13)
    do, dl = torch.randn_like(out), torch.randn_like(lse)
    ours = torch.autograd.grad([out, lse], [q, k, v], [do, dl])
    theirs = torch.autograd.grad([dense, dense_lse], [q, k, v], [do, dl])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_associative():
    torch.manual_seed(0)
    a, b, c = ((torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)) for _ in range(3))
    for x, y in zip(merge([merge([a, b]), c]), merge([a, merge([b, c])]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


def test_who_meets_nobody_gets_zero_and_no_gradient():
    out, lse = torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)
    outs = [out.clone().requires_grad_() for _ in range(2)]
    lses = [lse.clone().requires_grad_() for _ in range(2)]
    merged, merged_lse = merge(list(zip(outs, lses, strict=True)))
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)
    (merged.sum() + merged_lse.masked_fill(merged_lse == -torch.inf, 0.0).sum()).backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (*outs, *lses))


def test_an_empty_part_changes_nothing():
    torch.manual_seed(0)
    out, lse = torch.randn(3, 4), torch.randn(3)
    merged = merge([(out, lse), (torch.zeros(3, 4), torch.full((3,), -torch.inf))])
    torch.testing.assert_close(merged, (out, lse), rtol=0, atol=1e-6)


def test_large_logits_do_not_overflow():
    out, lse = merge([(torch.ones(1, 2), torch.tensor([1000.0])), (torch.zeros(1, 2), torch.tensor([1001.0]))])
    torch.testing.assert_close(out, torch.full((1, 2), 1 / (1 + torch.e)))
    torch.testing.assert_close(lse, torch.tensor([1000.0 + 1.3132617]))


def test_sixteen_bit_parts_are_merged_in_float32():
    out = torch.tensor([[1.0]], dtype=torch.bfloat16)
    merged, lse = merge([(out, torch.tensor([0.0])), (2 * out, torch.tensor([0.0]))])
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 1.5
    assert lse.dtype == torch.float32


def test_mistakes_are_named():
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match=r"parts\[1\]"):
        merge([(out, lse), (out[:1], lse[:1])])
    with pytest.raises(ValueError, match=r"parts\[0\]"):
        merge([(out, lse[:1])])
