"""Time along the row and position in the document, from whatever the context says."""

import pytest
import torch
from torch import Tensor

from attention.clock import Clock, Stream, read_clock
from attention.lifetimes import FOREVER
from attention.mixer import Context

POSITIONS = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]])
ENDS = torch.tensor([[2, 2, 5, 5, 5], [4, 4, 4, 4, 5]])
NOWHERE = torch.tensor([[2, 2, FOREVER, FOREVER, FOREVER], [4, 4, 4, 4, FOREVER]])


def x(batch: int = 2, length: int = 5) -> Tensor:
    """Only its shape is read."""
    return torch.zeros(batch, length, 3)


@pytest.mark.parametrize("ctx", [None, Context()])
def test_without_a_word_a_row_is_one_document(ctx: Context | None) -> None:
    clock = read_clock(x(), ctx, None)
    assert clock.now == 0
    assert clock.time.tolist() == clock.position.tolist() == [[0, 1, 2, 3, 4]]
    assert clock.end is None


@pytest.mark.parametrize(
    "ctx",
    [Context(positions=POSITIONS), Context(document_ends=ENDS), Context(positions=POSITIONS, document_ends=ENDS)],
    ids=["positions", "document_ends", "both"],
)
def test_positions_and_ends_tell_the_same(ctx: Context) -> None:
    clock = read_clock(x(), ctx, None)
    assert torch.equal(clock.position, POSITIONS)
    assert torch.equal(clock.end, NOWHERE)
    assert clock.starts.tolist() == [[0, 0, 2, 2, 2], [0, 0, 0, 0, 4]]


def test_a_row_may_begin_amid_a_document() -> None:
    clock = read_clock(x(1, 3), Context(positions=torch.tensor([[7, 8, 0]])), None)
    assert clock.starts.tolist() == [[-7, -7, 2]]
    assert clock.end.tolist() == [[2, 2, FOREVER]]
    assert clock.first_start_B.tolist() == [2]


def test_a_stream_goes_on() -> None:
    clock = read_clock(x(), None, Stream(10, torch.tensor([0, 7])))
    assert clock.now == 10
    assert clock.time.tolist() == [[10, 11, 12, 13, 14]]
    assert clock.position.tolist() == [[10, 11, 12, 13, 14], [3, 4, 5, 6, 7]]
    assert clock.first_start_B.tolist() == [FOREVER, FOREVER]


def test_documents_end_and_begin_in_a_stream() -> None:
    stream = Stream(10, torch.tensor([0, 7]))
    expected = [[10, 11, 0, 1, 2], [3, 4, 5, 6, 0]]
    told = [
        Context(document_ends=ENDS),
        Context(positions=torch.tensor(expected)),
        Context(positions=torch.tensor(expected), document_ends=ENDS),
    ]
    for ctx in told:
        clock = read_clock(x(), ctx, stream)
        assert clock.position.tolist() == expected
        assert clock.end.tolist() == [[12, 12, *[FOREVER] * 3], [*[14] * 4, FOREVER]]
        assert clock.first_start_B.tolist() == [12, 14]
        assert clock.after(2).start_B.tolist() == [12, 14]


def test_a_stream_moves_by_its_tokens() -> None:
    stream = Clock.plain(5).after(batch=3)
    assert (stream.now, stream.start_B.tolist()) == (5, [0, 0, 0])
    stream = read_clock(x(3, 2), None, stream).after(3)
    assert (stream.now, stream.start_B.tolist()) == (7, [0, 0, 0])


def test_a_stream_does_not_overflow() -> None:
    near_the_end = Stream(FOREVER - 5, torch.zeros(2, dtype=torch.int64))
    read_clock(x(2, 4), None, near_the_end).after(2)
    with pytest.raises(ValueError, match=f"at most {FOREVER - 1} tokens"):
        read_clock(x(2, 5), None, near_the_end).after(2)


def test_nobody_outlives_its_document() -> None:
    clock = read_clock(x(), Context(document_ends=ENDS), None)
    for_ever = clock.until(torch.full((1, 1, 5), FOREVER))
    assert for_ever.dtype == torch.int32
    assert torch.equal(for_ever[:, 0].long(), NOWHERE)
    assert clock.until(clock.time[:, None] + 1)[1, 0].tolist() == [1, 2, 3, 4, 5]
    beyond = Clock.plain(2).until(torch.full((1, 1, 2), FOREVER + 10))
    assert beyond.tolist() == [[[FOREVER, FOREVER]]]


@pytest.mark.parametrize("name", ["positions", "document_ends"])
def test_a_wrong_shape_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"ctx.{name} must have shape \[2, 5\], got \[2, 4\]"):
        read_clock(x(), Context(**{name: torch.zeros(2, 4, dtype=torch.int64)}), None)


def test_all_layers_share_one_clock_and_rotary_table() -> None:
    packed, plain = Context(positions=POSITIONS), Context()
    for ctx in (packed, plain):
        first, second = (read_clock(x(), ctx.of_layer(x()), None) for _ in range(2))
        assert first is second
        assert first.rotary(6, 100.0) is second.rotary(6, 100.0)
        assert first.rotary(6, 100.0) is not first.rotary(6, 50.0)


def test_another_packing_is_another_clock() -> None:
    ctx = Context(positions=POSITIONS)
    read_clock(x(), ctx, None)
    ctx.positions = torch.arange(5).expand(2, 5)
    assert torch.equal(read_clock(x(), ctx, None).position, ctx.positions)
    assert read_clock(x(2, 4), Context(memo=ctx.memo), None).position.tolist() == [[0, 1, 2, 3]]


def test_rotary_follows_positions_not_times() -> None:
    cos, _ = read_clock(x(), Context(positions=POSITIONS), None).rotary(4, 100.0)
    assert cos.shape == (2, 1, 5, 2)
    assert torch.equal(cos[0, 0, :2], cos[0, 0, 2:4])


@pytest.mark.parametrize("ctx", [None, Context(positions=POSITIONS)], ids=["plain", "packed"])
def test_a_stream_of_another_batch_is_refused(ctx: Context | None) -> None:
    with pytest.raises(ValueError, match=r"the state was made for 3 sequences, got 2"):
        read_clock(x(), ctx, Stream(7, torch.zeros(3, dtype=torch.int64)))


class Slices:
    """One of several ranks that share a row, which asks nobody."""

    def __init__(self, rank: int, lengths: tuple[int, ...]) -> None:
        self.rank, self.lengths = rank, lengths

    def exchange(self, rows: Tensor, send: object, receive: object) -> Tensor:
        raise AssertionError("without documents nobody has to ask")


def test_a_shard_without_documents_knows_its_place() -> None:
    clock = read_clock(x(2, 3), Context(shard=Slices(1, (2, 3, 1))), None)
    assert clock.now == 2
    assert clock.time.tolist() == clock.position.tolist() == [[2, 3, 4]]
    assert clock.query_time is not None
    assert clock.mine == slice(2, 5)
    assert clock.whole.time.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert [clock.of_rank(rank).now for rank in range(3)] == [0, 2, 5]
    again = read_clock(x(2, 3), Context(shard=Slices(1, (2, 3, 1))), None)
    assert again.memo is clock.memo, "what layers and steps compute alike is computed once"
    assert again.shard is not clock.shard
    assert read_clock(x(2, 3), Context(shard=Slices(1, (1, 3, 2))), None).memo is not clock.memo
