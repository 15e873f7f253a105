"""Vectors brought to one root mean square: the definition, gradients included."""

import pytest
import torch

from attention.ops.norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_is_its_definition(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 2, 3, 5, 8, generator=generator, dtype=torch.float64)
    x[0, 0] = 0.0
    x = x.transpose(1, 2).requires_grad_()  # heads behind tokens in memory
    dy = dy.transpose(1, 2)
    (y, dx), (expected, expected_dx) = (
        (y, torch.autograd.grad(y, x, dy)[0]) for y in (rms_norm(x, eps, 0.3), rms_norm_reference(x, eps, 0.3))
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda t: rms_norm(t, eps, 0.3), x)


def test_16_bits_come_out_wide() -> None:
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    y = rms_norm(x, 1e-6, 2.0)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, rms_norm_reference(x.float(), 1e-6, 2.0))
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
