"""Codes of keys, and what earlier blocks hold of each code."""

import pytest
import torch
from torch import Tensor

from attention import native
from attention.ops.codes import code_prefix, code_sums, code_totals, look_up, straight_through, vq_assign

CODES, LENGTH = 4, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


needs_kernels = pytest.mark.skipif(native.why_not("codes") is not None, reason=str(native.why_not("codes")))


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Of which float32 knows every product and sum."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


# Assignment


def test_a_key_takes_the_nearest_code() -> None:
    k, codebook = drawn(2, 3, 50, 5), drawn(3, CODES, 5, seed=1)
    distance = (k[:, :, :, None] - codebook[None, :, None]).square().sum(-1)
    code = vq_assign(k, codebook)
    assert code.dtype == torch.int32
    assert torch.equal(code.long(), distance.argmin(-1))
    assert torch.equal(look_up(codebook, code)[1, 2, 7], codebook[2, code[1, 2, 7]])


def test_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    k, codebook = drawn(2, 3, 50, 5), drawn(3, CODES, 5, seed=1)
    expected = vq_assign(k, codebook)
    monkeypatch.setattr("attention.ops.codes.DISTANCES", 7 * 2 * 3 * CODES)
    assert torch.equal(vq_assign(k, codebook), expected)


@needs_kernels
@pytest.mark.parametrize(("tokens", "codes", "width"), [(1, 1, 1), (7, 3, 5), (513, 16, 8), (1030, 70, 33)])
def test_kernels_choose_exactly(tokens: int, codes: int, width: int) -> None:
    """Whole numbers, so that many distances are equal and none is rounded; heads that lie side by side in memory."""
    k = whole_numbers(2, tokens, 3, 2 * width).transpose(1, 2)[..., width:]
    codebook = whole_numbers(3, codes, width, seed=1)
    distance = (k[:, :, :, None].double() - codebook[None, :, None].double()).square().sum(-1)
    lowest = (distance == distance.amin(-1, keepdim=True)).long().argmax(-1)
    assert torch.equal(vq_assign(k, codebook).long(), lowest)


@needs_kernels
def test_a_code_depends_on_its_key_alone() -> None:
    """In decoding, one token at a time, it must be that of training: to the bit, near ties too."""
    k, codebook = drawn(2, 3, 40, 64).float(), drawn(3, 50, 64, seed=1).float()
    alone = torch.cat([vq_assign(k[:, :, t : t + 1], codebook) for t in range(40)], 2)
    assert torch.equal(alone, vq_assign(k, codebook))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_code_that_is_no_number_is_nearest(dtype: torch.dtype) -> None:
    """So it shows: the first of them is looked up."""
    k, codebook = drawn(1, 1, 5, 4).to(dtype), drawn(1, 40, 4, seed=1).to(dtype)
    codebook[0, [21, 7]] = torch.nan
    assert vq_assign(k, codebook).tolist() == [[[7] * 5]]


def test_of_equals_the_lowest() -> None:
    """Whole numbers, so that distances are exact: codes 1 and 2 are one, 0 and 3 equally far from 0."""
    codebook = torch.tensor([[[-2.0, 0.0], [5.0, 5.0], [5.0, 5.0], [0.0, 2.0]]])
    k = torch.tensor([[[[6.0, 5.0], [0.0, 0.0], [0.0, 1.0]]]])
    assert vq_assign(k, codebook).tolist() == [[[1, 0, 3]]]


def test_no_16_bits_decide() -> None:
    """Codes 1 and 1 + 2^-10 are one number in bfloat16."""
    codebook = torch.tensor([[[1.0], [1.0 + 2**-10]]])
    k = torch.tensor([[[[1.0 + 2**-10], [1.0]]]])
    with torch.autocast("cpu", torch.bfloat16):
        assert vq_assign(k, codebook).tolist() == [[[1, 0]]]


def test_the_gradient_goes_straight_through() -> None:
    x, quantised = drawn(2, 3).requires_grad_(), drawn(2, 3, seed=1)
    y, weights = straight_through(x, quantised), drawn(2, 3, seed=2)
    assert torch.equal(y, quantised)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_sums_by_code() -> None:
    code, x = torch.tensor([[[0, 2, 2, 0, 2]], [[3, 3, 1, 3, 2]]], dtype=torch.int32), drawn(2, 1, 5, 3)
    number, total = code_sums(code, x, CODES)
    assert number.tolist() == [[[2, 0, 3, 0]], [[0, 1, 1, 3]]]
    for row in range(2):
        for entry in range(CODES):
            expected = x[row, 0, code[row, 0] == entry].sum(0)
            torch.testing.assert_close(total[row, 0, entry], expected, rtol=0, atol=1e-14)


@needs_kernels
def test_sums_by_code_in_float32() -> None:
    code = torch.randint(CODES, (2, 3, 300), generator=torch.Generator().manual_seed(1))
    x = whole_numbers(2, 3, 300, 9)
    for ours, exact in zip(code_sums(code, x, CODES), code_sums(code, x.double(), CODES), strict=True):
        assert torch.equal(ours.double(), exact)


# Prefix


@pytest.mark.parametrize("at_once", [2, 256])
def test_totals_by_code(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts and means of all tokens but those of the code that nobody has; with their gradient."""
    monkeypatch.setattr("attention.ops.codes.AT_ONCE", at_once)
    code = torch.tensor([[[0, 2, CODES, 2, 0, 2, CODES]], [[3, 3, 3, CODES, CODES, 1, 3]]], dtype=torch.int32)
    v = drawn(2, 1, 7, 3).requires_grad_()
    count, mean = code_totals(code, v, CODES)
    assert count[:, 0].tolist() == [[2, 0, 3, 0], [0, 1, 0, 4]]
    for row in range(2):
        for number in range(CODES):
            members = v[row, 0][code[row, 0] == number]
            expected = members.mean(0) if len(members) else torch.zeros(3, dtype=v.dtype)
            assert torch.allclose(mean[row, 0, number], expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda v: code_totals(code, v, CODES)[1], [v])
    assert code_totals(code, v.detach().bfloat16(), CODES)[1].dtype == torch.float32


def definition(
    code: Tensor, v: Tensor, fresh: Tensor, whole: Tensor, carry: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Block by block, from a list of all tokens that it may count."""
    batch, heads, blocks = code.shape[:3]
    counts, means = torch.zeros(batch, heads, blocks, CODES), v.new_zeros(batch, heads, blocks, CODES, v.shape[-1])
    counts = counts.double()
    rows = max(1, len(fresh))
    for b in range(batch):
        for g in range(heads):
            for n in range(blocks):
                begin = max([i for i in range(n + 1) if fresh[b % rows, i]], default=None)
                mine = [i for i in range(begin or 0, n) if whole[b % len(whole), i]]
                for s in range(CODES):
                    met = [v[b, g, i, t] for i in mine for t in range(LENGTH) if code[b, g, i, t] == s]
                    count, total = float(len(met)), torch.stack(met).sum(0) if met else v.new_zeros(v.shape[-1])
                    if begin is None and carry is not None:
                        total = total + carry[0][b, g, s] * carry[1][b, g, s]
                        count += float(carry[0][b, g, s])
                    counts[b, g, n, s], means[b, g, n, s] = count, total / max(count, 1.0)
    return counts, means


def example(blocks: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    code = torch.randint(CODES - 1, (rows, 2, blocks, LENGTH), generator=torch.Generator().manual_seed(3))
    return code.int(), drawn(rows, 2, blocks, LENGTH, 5, seed=4).requires_grad_()


def some_carry() -> tuple[Tensor, Tensor]:
    count = torch.tensor([3.0, 0.0, 1.0, 2.0]).double().expand(2, 2, CODES)
    return count, drawn(2, 2, CODES, 5, seed=6) * (count > 0)[..., None]


FLAGS = {
    "one document": ([[1, 0, 0, 0, 0, 0]], [[1] * 6]),
    "goes on": ([[0] * 6], [[1] * 6]),
    "documents": ([[0, 0, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0]], [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1]]),
}


@pytest.mark.parametrize("carried", [False, True], ids=["from the start", "carried"])
@pytest.mark.parametrize(("fresh", "whole"), FLAGS.values(), ids=FLAGS.keys())
def test_prefix_is_its_definition(fresh: list, whole: list, carried: bool) -> None:
    fresh, whole = (torch.tensor(flags, dtype=torch.bool) for flags in (fresh, whole))
    carry = some_carry() if carried else None
    code, v = example(6)
    count, mean = code_prefix(code, v, CODES, fresh=fresh, whole=whole, carry=carry)
    expected = definition(code, v, fresh, whole, carry)
    torch.testing.assert_close(count, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(mean, expected[1], rtol=0, atol=1e-13)
    weights = drawn(*mean.shape, seed=7)
    ours, theirs = (torch.autograd.grad((m * weights).sum(), v)[0] for m in (mean, expected[1]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert not count[..., -1].any() or carried  # nobody has the last code


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("carried", [False, True], ids=["from the start", "carried"])
@pytest.mark.parametrize(("fresh", "whole"), FLAGS.values(), ids=FLAGS.keys())
def test_kernels_in_float32(fresh: list, whole: list, carried: bool, threads: int) -> None:
    """Values, and all gradients, as the torch path has them in float64; columns beyond one stretch."""
    flags = {name: torch.tensor(of, dtype=torch.bool) for name, of in (("fresh", fresh), ("whole", whole))}
    code, _ = example(6)
    v = drawn(2, 2, 6, LENGTH, 37, seed=4).requires_grad_()
    count = some_carry()[0]
    mean = drawn(2, 2, CODES, 37, seed=6).requires_grad_()

    def run(dtype: torch.dtype) -> list[Tensor]:
        carry = (count.to(dtype), mean.to(dtype)) if carried else None
        counts, means = code_prefix(code, v.to(dtype), CODES, carry=carry, **flags)
        assert means.dtype == dtype
        score = (means * drawn(*means.shape, seed=7)).sum()
        return [counts, means, *torch.autograd.grad(score, [v, mean], materialize_grads=True, allow_unused=True)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = run(torch.float32)
    finally:
        torch.set_num_threads(before)
    for mine, exact in zip(ours, run(torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=0, atol=1e-5)


def test_two_calls_are_one() -> None:
    fresh, whole = torch.tensor([[1, 0, 0, 0, 0, 0]]).bool(), torch.ones(1, 6).bool()
    code, v = example(6)
    count, mean = code_prefix(code, v, CODES, fresh=fresh, whole=whole)
    carry = count[:, :, 3], mean[:, :, 3]
    for ours, theirs in zip(
        code_prefix(code[:, :, 3:], v[:, :, 3:], CODES, fresh=fresh[:, 3:], whole=whole[:, 3:], carry=carry),
        (count[:, :, 3:], mean[:, :, 3:]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fresh", [[False] * 4, [True, False, False, False], [False, False, True, False]])
def test_the_carried_mean_has_its_gradient(fresh: list[bool]) -> None:
    code, v = example(4)
    count, mean = some_carry()
    told = {"fresh": torch.tensor([fresh]), "whole": torch.tensor([[True, True, False, True]])}
    inputs = [v.requires_grad_(), mean.requires_grad_()]
    prefix = lambda v, mean: code_prefix(code, v, CODES, carry=(count, mean), **told)[1]  # noqa: E731
    assert torch.autograd.gradcheck(prefix, inputs)


def test_means_stay_exact_over_many_blocks() -> None:
    """In float32, values about 1000: a running sum would be off by more than the spread of its values."""
    code = torch.zeros(1, 1, 3000, 4, dtype=torch.int32)
    v = (1000.0 + drawn(1, 1, 3000, 4, 1)).float()
    flags = torch.zeros(1, 3000, dtype=torch.bool)
    count, mean = code_prefix(code, v, 1, fresh=flags, whole=~flags)
    exact = v[:, :, :-1].double().mean()
    assert float(count[0, 0, -1, 0]) == 4 * 2999
    assert abs(float(mean[0, 0, -1, 0, 0]) - float(exact)) < 1e-2


@pytest.mark.parametrize("blocks", [0, 1])
def test_no_block_before(blocks: int) -> None:
    code, v = example(blocks)
    flags = torch.ones(1, blocks, dtype=torch.bool)
    count, mean = code_prefix(code, v, CODES, fresh=flags, whole=flags)
    assert count.shape == (2, 2, blocks, CODES)
    assert not count.any()
    assert not mean.any()
    assert not torch.autograd.grad(mean.sum(), v)[0].any()


def test_values_in_16_bits_have_wide_means() -> None:
    code, v = example(6)
    fresh = torch.zeros(1, 6, dtype=torch.bool)
    rounded = v.detach().bfloat16().requires_grad_()
    count, mean = code_prefix(code, rounded, CODES, fresh=fresh, whole=~fresh)
    assert count.dtype == mean.dtype == torch.float32
    exact = code_prefix(code, rounded.detach().double(), CODES, fresh=fresh, whole=~fresh)[1]
    torch.testing.assert_close(mean.double(), exact, rtol=0, atol=1e-6)
    mean.sum().backward()
    assert rounded.grad.dtype == torch.bfloat16
