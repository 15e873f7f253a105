"""What the fused kernel takes: groups of keys met by stretches of queries; and that it is still `attend`."""

import pytest
import torch
from torch import Tensor

from attention.lifetimes import FOREVER, Lifetimes, query_intervals
from attention.ops.attend import attend, attend_reference
from attention.ops.attend_segments import Run, Segments, Stretch, find_segments

LENGTH, BLOCK = 22, 5


def life(births: list[int], deaths: list[int]) -> Lifetimes:
    return Lifetimes(torch.tensor(births, dtype=torch.int32), torch.tensor(deaths, dtype=torch.int32))


def read_by_blocks(keys: int) -> Lifetimes:
    """From the third block on each reads its own keys; those of the first two nobody meets."""
    begins = [b * BLOCK for b in range(-(-LENGTH // BLOCK)) for _ in range(keys)]
    return life(begins, [min(b + BLOCK, LENGTH) if b >= 2 * BLOCK else b for b in begins])


def older_half() -> Lifetimes:
    """A token is met from BLOCK + 1 steps on to the end of the next block, so the last one of a block never."""
    return life([t + BLOCK + 1 for t in range(LENGTH)], [(t // BLOCK + 2) * BLOCK for t in range(LENGTH)])


def documents() -> Lifetimes:
    """Of lengths 3, 3, 10, 1, 5."""
    ends = [3] * 3 + [6] * 3 + [16] * 10 + [17] + [22] * 5
    return life(list(range(LENGTH)), ends)


TAKEN = {
    "codes": (read_by_blocks(4), False),
    "one code": (read_by_blocks(1), False),
    "older half": (older_half(), True),
    "documents": (documents(), True),
    "all": (life([0] * 7, [FOREVER] * 7), False),
}
LEFT = {
    "window": life(list(range(LENGTH)), [t + 4 for t in range(LENGTH)]),
    "two that overlap": life([0, 0, 3, 3], [5, 5, 9, 9]),
    "born two by two": life([0, 0, 1, 1], [2, 2, 2, 2]),
    "dead before the last": life([0, 1, 2], [2, 3, 4]),
    "falling": life([10, 0], [15, 5]),
    "a gap": life([0, 3, 0], [5, 3, 5]),
    "late": life([0, 1], [9, 9]),
    "nobody": life([5], [5]),
}


def segments_of(lives: Lifetimes, biased: bool = False) -> Segments | None:
    keys = lives.birth.shape[-1]
    start, stop = query_intervals(lives, None, heads=1, kv_heads=1, num_queries=LENGTH, num_keys=keys)
    return find_segments(start, stop, LENGTH, biased)


@pytest.mark.parametrize(("lives", "causal"), TAKEN.values(), ids=TAKEN.keys())
def test_groups_are_found(lives: Lifetimes, causal: bool) -> None:
    found = segments_of(lives)
    assert found is not None
    assert found.causal == causal
    assert (segments_of(lives, biased=True) is None) == causal


@pytest.mark.parametrize("lives", LEFT.values(), ids=LEFT.keys())
def test_nothing_else_is(lives: Lifetimes) -> None:
    assert segments_of(lives) is None


def test_equal_groups_make_one_run() -> None:
    blocks = [Run(Stretch(10, 5, 5), Stretch(8, 4, 4), 2), Run(Stretch(20, 2, 2), Stretch(16, 4, 4), 1)]
    assert segments_of(read_by_blocks(4)) == Segments([blocks], causal=False)
    halves = [Run(Stretch(6, 4, 5), Stretch(0, 4, 5), 3), Run(Stretch(21, 1, 1), Stretch(15, 1, 1), 1)]
    assert segments_of(older_half()) == Segments([halves], causal=True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("through_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("biased", ["no bias", "bias", "learnt bias"])
@pytest.mark.parametrize("batched", [False, True], ids=["rows alike", "rows of their own"])
@pytest.mark.parametrize("lives", [pair[0] for pair in TAKEN.values()], ids=TAKEN.keys())
def test_it_is_the_definition(lives: Lifetimes, biased: str, through_lse: bool, batched: bool) -> None:
    keys = lives.birth.shape[-1]
    q, k, v = drawn(2, 4, LENGTH, 6), drawn(2, 2, keys, 6, seed=1), drawn(2, 2, keys, 3, seed=2)
    if batched:  # the second row's keys die one by one behind half of the row: other groups, or none
        death = torch.stack([lives.death, lives.death.clamp(max=LENGTH // 2)])[:, None]
        lives = Lifetimes(lives.birth.expand_as(death), death)
    bias = None
    if biased != "no bias":
        bias = drawn(2, 2, keys, seed=3).detach()
        bias[:, 1, ::3] = -torch.inf
        bias[1, 0] = -torch.inf  # this head meets nobody
        bias.requires_grad_(biased == "learnt bias")
    inputs = [q, k, v] + ([bias] if bias is not None and bias.requires_grad else [])

    def run(which: object) -> list[Tensor]:
        out, lse = which(q, k, v, lives, key_bias=bias, scale=0.4)  # type: ignore[operator]
        total = (out * drawn(*out.shape, seed=4).detach()).sum()
        if through_lse:
            total = total + (lse.masked_fill(lse == -torch.inf, 0.0) * drawn(*lse.shape, seed=5).detach()).sum()
        return [out, lse, *torch.autograd.grad(total, inputs)]

    for ours, theirs in zip(run(attend), run(attend_reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
