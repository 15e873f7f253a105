"""Rotary embedding: what it means, and that it stays precise far out."""

import math

import pytest
import torch

from attention.ops.rotary import _turned, apply_rotary, rotary, rotary_dim, rotary_table


def by_hand(x, position, base, rotated):
    """One vector, pair by pair, in Python floats."""
    y, half = list(x), rotated // 2
    for j in range(half):
        angle = position * base ** (-2 * j / rotated)
        a, b = x[j], x[j + half]
        y[j], y[j + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return y


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_rotates_pairs(fraction):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 7, 100], [3, 4, 0, 1, 2]])
    y = rotary(x, positions, 10_000.0, fraction)
    for b in range(2):
        for h in range(3):
            for t in range(5):
                expected = by_hand(x[b, h, t].tolist(), int(positions[b, t]), 10_000.0, round(8 * fraction))
                torch.testing.assert_close(y[b, h, t], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("start", [0, 2**20, 2**24])
def test_inner_products_depend_on_distance_alone_however_far_out(start):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64, 64)
    positions = torch.arange(64)
    near = rotary(q, positions, 10_000.0) @ rotary(k, positions, 10_000.0).transpose(-1, -2)
    far = rotary(q, positions + start, 10_000.0) @ rotary(k, positions + start, 10_000.0).transpose(-1, -2)
    torch.testing.assert_close(far, near, rtol=0, atol=2e-5)


def test_sixteen_million_in_float32():
    x = torch.ones(1, 1, 1, 2)
    y = rotary(x, torch.tensor([2**24 + 1]), 10_000.0).flatten().tolist()
    angle = float(2**24 + 1)  # a float32 angle would be 2^24
    assert y == pytest.approx([math.cos(angle) - math.sin(angle), math.cos(angle) + math.sin(angle)], abs=1e-6)


def test_one_table_serves_all():
    torch.manual_seed(0)
    positions = torch.randint(0, 1000, (2, 5))
    table = rotary_table(positions, 8, 500.0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 5, 8).to(dtype)
        assert torch.equal(apply_rotary(x, table), rotary(x, positions, 500.0))
        assert apply_rotary(x, table).dtype == dtype


def test_positions_per_head():
    torch.manual_seed(0)
    x, positions = torch.randn(2, 3, 5, 8), torch.randint(0, 1000, (2, 3, 5))
    y = rotary(x, positions, 10_000.0)
    for h in range(3):
        assert torch.equal(y[:, h : h + 1], rotary(x[:, h : h + 1], positions[:, h], 10_000.0))


def test_sixteen_bit_is_rotated_in_float32():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 50, 16).bfloat16()
    positions = torch.arange(50)
    assert torch.equal(rotary(x, positions, 1e4), rotary(x.float(), positions, 1e4).bfloat16())


def test_gradient_is_the_rotation_back():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(6)
    y = rotary(x, positions, 10_000.0)
    (grad,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(grad, x.detach(), rtol=0, atol=1e-14)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"fraction: 0.4 of 8"):
        rotary_dim(8, 0.4)
    with pytest.raises(ValueError, match=r"fraction: 0.0"):
        rotary_dim(8, 0.0)
    with pytest.raises(ValueError, match=r"fraction: 1.5"):
        rotary_dim(8, 1.5)
    with pytest.raises(ValueError, match=r"base: .* got 1"):
        rotary_table(torch.arange(3), 8, 1.0)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_turned_and_turned_back(fraction: float) -> None:
    """The definition and its gradient, where positions differ by example or by head."""
    table = rotary_table(torch.randint(0, 50, (2, 3, 7)), rotary_dim(8, fraction), 100.0)
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64).requires_grad_()
    expected = _turned(x, *table)
    torch.testing.assert_close(apply_rotary(x, table), expected, rtol=0, atol=1e-14)
    weight = torch.randn_like(x)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (apply_rotary(x, table), expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)


def test_it_compiles_to_one_graph() -> None:
    table = rotary_table(torch.arange(7), 8, 100.0)
    x = torch.randn(2, 3, 7, 8)
    compiled = torch.compile(apply_rotary, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, table), apply_rotary(x, table))
