"""The tail of a stream holds its last tokens and little else; the state around it counts what lives."""

import pytest
import torch
from torch import Tensor

from attention.clock import read_clock
from attention.mixer import Context
from attention.tail import SpanState, Tail


def rows(start: int, stop: int) -> dict[str, Tensor]:
    """Tokens that carry their own number; one name with two heads, one wider."""
    number = torch.arange(start, stop, dtype=torch.float32)[None, None, :, None]
    return {"k": number.expand(2, 2, -1, 1), "x": number.expand(2, 1, -1, 3)}


def numbers(tensors: dict[str, Tensor]) -> list[int]:
    """The tokens held, the same under every name."""
    found = [x.int() for x in tensors.values()]
    assert all(bool((x == found[0][:1, :1, :, :1]).all()) for x in found)
    return found[0][0, 0, :, 0].tolist()


def test_the_last_tokens_are_there_whatever_came_how() -> None:
    generator = torch.Generator().manual_seed(0)
    tail, now, expected = Tail(), 0, []
    for _ in range(200):
        length = int(torch.randint(1, 9, (1,), generator=generator))
        wanted = int(torch.randint(0, len(expected) + length + 1, (1,), generator=generator))
        new = rows(now, now + length)
        seen = expected + list(range(now, now + length))
        for count in (0, len(expected) // 2, len(expected)):
            assert numbers(tail.before(new, count)) == seen[len(expected) - count :]
        tail.push(new, wanted)
        expected = seen[len(seen) - wanted :]
        now += length
        assert tail.size == len(expected)


def test_buffers_stay_small_and_are_seldom_moved() -> None:
    tail, moves, before = Tail(), 0, None
    for t in range(1000):
        tail.push(rows(t, t + 1), 8)
        moves += tail.buffers["k"] is not before
        before = tail.buffers["k"]
    assert numbers(tail.before(rows(1000, 1001), 8)) == list(range(992, 1001))
    assert tail.capacity <= 2 * 8 * 2 * tail.bytes_of_a_token
    assert moves < 1000 / 4
    assert tail.bytes_of_a_token == (2 * 1 + 1 * 3) * 4


def test_a_long_prefill_reserves_for_what_is_kept() -> None:
    tail = Tail()
    tail.push(rows(0, 1000), 3)
    assert tail.capacity <= 2 * 3 * 2 * tail.bytes_of_a_token


def test_what_is_stored_has_no_graph_and_what_is_handed_out_does_not_change() -> None:
    tail = Tail()
    x = torch.ones(1, 1, 4, 2, requires_grad=True)
    tail.push({"k": x * 1}, 4)
    given = tail.before({"k": x * 2}, 2)["k"]
    tail.push({"k": x * 3}, 1)
    tail.push({"k": x * 4}, 4)
    given.sum().backward()
    assert given[0, 0, :, 0].tolist() == [1, 1, 2, 2, 2, 2]
    assert x.grad is not None
    assert bool((x.grad == 2).all())


@pytest.mark.parametrize("wanted", [[0, 3], [5, 5], [9, 2]])
def test_a_state_counts_the_tokens_of_each_row(wanted: list[int]) -> None:
    state = SpanState(2, torch.device("cpu"))
    clock = read_clock(torch.zeros(2, 7, 1), Context(positions=torch.arange(7).expand(2, 7)), state.stream)
    state.keep(rows(0, 7), torch.tensor(wanted), clock)
    kept = [min(n, 7) for n in wanted]  # more than were seen cannot be kept
    assert state.kept_B.tolist() == kept
    assert state.tail.size == max(kept)
    assert state.bytes == sum(kept) * state.tail.bytes_of_a_token
    assert state.bytes <= state.capacity
    assert state.stream.now == 7
