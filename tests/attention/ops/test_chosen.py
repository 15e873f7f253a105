"""Projections by lists against the same projections of all tokens, masked."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention.ops.chosen import Chosen, gather_project, scatter_project

B, H, T, D, WIDTH = 3, 4, 11, 5, 7


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def some() -> Tensor:
    mask = torch.rand(B, H, T, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[1, 2] = False  # no token of a row
    return mask


MASKS = {
    "some": some,
    "a head without tokens": lambda: some() & (torch.arange(H) != 1)[:, None],
    "a head with all": lambda: some() | (torch.arange(H) == 3)[:, None],
    "all": lambda: torch.ones(B, H, T, dtype=torch.bool),
    "one token": lambda: (torch.arange(T) == 6).expand(B, H, T),
    "nobody": lambda: torch.zeros(B, H, T, dtype=torch.bool),
}
each_mask = pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())


def lists(mask: Tensor) -> list[list[list[int]]]:
    return [[[t for t in range(T) if mask[b, h, t]] for h in range(H)] for b in range(B)]


@each_mask
def test_lists_hold_the_tokens_in_their_order(make) -> None:
    mask = make()
    chosen = Chosen.of(mask)
    longest = max(len(mine) for row in lists(mask) for mine in row)
    assert chosen.index.tolist() == [[mine + [-1] * (longest - len(mine)) for mine in row] for row in lists(mask)]


@each_mask
def test_a_list_is_projected_as_all_tokens_are(make) -> None:
    mask, x, weight = make(), drawn(B, T, WIDTH), drawn(H, WIDTH, D, seed=2)
    chosen = Chosen.of(mask)
    out = gather_project(x, weight, chosen)
    everyone = torch.einsum("btw,hwd->bhtd", x, weight)
    rows = [everyone[b, h, mine] for b, row in enumerate(lists(mask)) for h, mine in enumerate(row)]
    ours = [out[b, h, : len(mine)] for b, row in enumerate(lists(mask)) for h, mine in enumerate(row)]
    assert not out[chosen.index < 0].any()
    compare(torch.cat(ours), torch.cat(rows), [x, weight])


@each_mask
def test_back_at_their_tokens_the_heads_are_summed(make) -> None:
    """Whatever stands behind the end of a list."""
    mask, y, weight = make(), drawn(B, H, T, D), drawn(H, D, WIDTH, seed=2)
    chosen = Chosen.of(mask)
    listed = y.take_along_dim(chosen.index.clamp(min=0)[..., None], 2)
    listed = torch.where(chosen.index[..., None] < 0, torch.nan, listed)
    expected = torch.einsum("bhtd,hdw->btw", y * mask[..., None], weight)
    compare(scatter_project(listed, weight, chosen, T), expected, [y, weight])


def compare(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_work_is_that_of_the_chosen() -> None:
    mask, x, weight = some(), drawn(B, T, WIDTH), drawn(H, WIDTH, D, seed=2)
    chosen = Chosen.of(mask)
    with FlopCounterMode(display=False) as counter:
        y = gather_project(x, weight, chosen)
        scatter_project(y, weight.transpose(1, 2), chosen, T).sum().backward()
    assert counter.get_total_flops() == 6 * 2 * int(mask.sum()) * WIDTH * D


def test_16_bits_are_summed_in_32() -> None:
    """512 heads that add 1 each: in bfloat16 the sum would stop at 256."""
    heads = 512
    chosen = Chosen.of(torch.ones(1, heads, 2, dtype=torch.bool))
    y, weight = torch.ones(1, heads, 2, 1, dtype=torch.bfloat16), torch.ones(heads, 1, 3, dtype=torch.bfloat16)
    out = scatter_project(y, weight, chosen, 2)
    assert out.dtype == torch.bfloat16
    assert (out == heads).all()
