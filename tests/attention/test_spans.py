"""Blocks of a grid on positions: all that are whole are found, in as many slots as any packing needs."""

import itertools

import pytest
import torch
from torch import Tensor

from attention.clock import Clock, read_clock
from attention.mixer import Context
from attention.spans import Blocks, averaged, block_end, largest, with_earlier
from tests.conformance.sequences import Packing

T = 40


def packings() -> list[Packing]:
    """Random rows of documents, some of one token, some longer than any block."""
    generator = torch.Generator().manual_seed(0)

    def row() -> list[int]:
        lengths: list[int] = []
        while sum(lengths) < T:
            longest = int(torch.randint(1, 20, (1,), generator=generator))
            lengths.append(min(int(torch.randint(1, longest + 1, (1,), generator=generator)), T - sum(lengths)))
        return lengths

    return [Packing([row(), row(), [T]]) for _ in range(40)]


def clock_of(packing: Packing) -> Clock:
    ctx = Context(positions=packing.positions, document_ends=packing.document_ends)
    return read_clock(torch.zeros(len(packing.lengths), T, 1), ctx, None)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 16])
def test_every_whole_block_has_one_slot(length: int) -> None:
    number = torch.arange(T, dtype=torch.float64)[None, None, :, None]
    for packing in packings():
        blocks = Blocks.of(clock_of(packing), length)
        assert blocks.whole.shape[1] == T // length
        tokens = blocks.tokens(number.expand(3, 1, T, 1))[:, 0, :, :, 0].long()
        for row in range(3):
            spans = [(start, stop) for r, start, stop in packing.spans() if r == row]
            expected = [
                (first, stop, first - start + length - 1)
                for start, stop in spans
                for first in range(start, stop - length + 1, length)
            ]
            whole = blocks.whole[row]
            assert int(whole.sum()) == len(expected)
            for slot, (first, end, last) in zip(whole.nonzero()[:, 0].tolist(), expected, strict=True):
                assert tokens[row, slot].tolist() == list(range(first, first + length))
                assert int(blocks.born[row, slot]) == first + length
                assert int(blocks.last[row, slot]) == last
                assert int(blocks.end[row, slot]) == end or end == T


def test_documents_that_are_over_have_no_block() -> None:
    clock = with_earlier(Clock(9, torch.arange(9, 15)[None], torch.arange(6)[None], None), 8)
    assert clock.position.tolist() == [list(range(-8, 6))]
    for length, blocks in ((1, 6), (2, 3), (4, 1), (3, 2)):
        assert Blocks.of(clock, length).whole.sum() == blocks


def test_one_document_needs_no_copy() -> None:
    x = torch.randn(2, 3, T, 5)
    blocks = Blocks.of(read_clock(torch.zeros(2, T, 1), None, None), 7)
    tokens = blocks.tokens(x, slice(1, None, 2))
    assert tokens.data_ptr() == x[:, :, 7:].data_ptr()
    assert torch.equal(tokens, torch.stack([x[:, :, 7:14], x[:, :, 21:28], x[:, :, 35:42]][:2], 2))
    assert bool(blocks.whole.all())


def test_blocks_of_smaller_blocks() -> None:
    """Maxima of maxima, level by level, are those of the tokens: for every block that is whole."""
    x = torch.randn(3, 2, T, 4, generator=torch.Generator().manual_seed(1))
    for packing in [Packing([[T], [T], [T]]), *packings()]:
        clock = clock_of(packing)
        pooled, unit = x, 1
        for length in (2, 4, 8, 16):
            blocks = Blocks.of(clock, length)
            pooled, unit = largest(blocks.tokens(pooled, unit=unit)), length
            expected = largest(blocks.tokens(x))
            assert torch.equal(pooled.movedim(1, 3)[blocks.whole], expected.movedim(1, 3)[blocks.whole])


def test_the_average_of_a_span_is_attention_of_its_query() -> None:
    generator = torch.Generator().manual_seed(2)
    query, k, v = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5, 4), (2, 3, 5, 6, 4), (2, 3, 5, 6, 8))
    )
    weights = torch.einsum("bgnd,bgnld->bgnl", query, k).mul(4**-0.5).softmax(-1)
    expected = torch.einsum("bgnl,bgnlc->bgnc", weights, v)
    out = averaged(query, k, v)
    assert float((out - expected).detach().abs().max()) < 1e-14
    target = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((y * target).sum(), (query, k, v)) for y in (out, expected))
    assert all(float((a - b).abs().max()) < 1e-13 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("cut", [1, 7, 20, 39])
def test_earlier_tokens_have_the_clock_they_had(cut: int) -> None:
    """But for those whose document is over, which have positions below 0."""
    for packing in packings():
        whole = clock_of(packing)
        rest = Clock(cut, whole.time[:, cut:], whole.position[:, cut:], whole.end[:, cut:])
        for count in (0, 1, cut):
            clock = with_earlier(rest, count)
            at = slice(cut - count, None)
            assert clock.now == cut - count
            assert torch.equal(clock.time, whole.time[:, at])
            goes_on = whole.starts[:, at] == whole.starts[:, cut : cut + 1]
            goes_on[:, count:] = True
            assert torch.equal(clock.position[goes_on], whole.position[:, at][goes_on])
            assert bool((clock.position[~goes_on] < 0).all())
            assert torch.equal(clock.end[goes_on], whole.end[:, at][goes_on])


def test_ends_of_blocks() -> None:
    clock = Clock(3, torch.arange(3, 9)[None], torch.tensor([[-2, -1, 0, 1, 2, 3]]), None)
    assert block_end(clock, 3).tolist() == [[[0, 0, 8, 8, 8, 11]]]
    ends: Tensor = block_end(Clock.plain(7), 4)
    assert [len(list(group)) for _, group in itertools.groupby(ends[0, 0].tolist())] == [4, 3]
