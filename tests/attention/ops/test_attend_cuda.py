"""`attend` on a CUDA device: the same results as on the CPU, the same bits in every run."""

from dataclasses import replace

import pytest
import torch

from attention.lifetimes import Lifetimes
from attention.ops.attend import attend, attend_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gradients(case, function):
    leaves = [x.requires_grad_() for x in case.leaves]
    out, lse = case.call(function)
    grads = torch.autograd.grad((out * out).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum(), leaves)
    return [x.detach().cpu() for x in (out, lse, *grads)]


def on_device(case):
    def moved(x):
        return None if x is None else x.detach().cuda()

    return replace(
        case,
        q=moved(case.q),
        k=moved(case.k),
        v=moved(case.v),
        life=Lifetimes(moved(case.life.birth), moved(case.life.death)),
        time=moved(case.time),
        key_bias=moved(case.key_bias),
        gate=None if case.gate is None else (moved(case.gate[0]), moved(case.gate[1])),
    )


@pytest.mark.parametrize("parts", ["usual", "small"])
def test_as_on_the_cpu(drawn, parts, request):
    if parts == "small":
        request.getfixturevalue("small_parts")
    theirs = gradients(drawn, attend_reference)
    ours, again = (gradients(on_device(drawn), attend) for _ in range(2))
    assert all(map(torch.equal, ours, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_folded_as_on_the_cpu(drawn_long):
    theirs = gradients(drawn_long, attend_reference)
    torch.testing.assert_close(gradients(on_device(drawn_long), attend), theirs, rtol=0, atol=1e-10)
