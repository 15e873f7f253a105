"""The thread works ahead within bounds, ends with the iterator, and hides no exception."""

import threading
import time
import traceback
from collections.abc import Iterator
from itertools import count

import pytest

from data.prefetch import prefetch
from tests.processes import wait_until


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    assert threads() == 0
    yield
    assert threads() == 0


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_all_items_in_order(depth: int) -> None:
    assert list(prefetch(range(50), depth)) == list(range(50))
    assert list(prefetch([], depth)) == []


def test_a_break_ends_the_thread() -> None:
    for item in prefetch(count(), 3):
        assert threads() == 1
        if item == 5:
            break


def test_closing_ends_the_thread_while_it_waits_for_room() -> None:
    made = []
    items = prefetch((made.append(i) or i for i in count()), 2)
    assert next(items) == 0
    wait_until(lambda: len(made) == 3)
    items.close()
    assert threads() == 0
    assert made == [0, 1, 2]


def test_an_iterator_that_is_never_used_starts_nothing() -> None:
    items = prefetch(count(), 2)
    assert threads() == 0
    del items


def test_no_more_than_depth_items_are_made_ahead() -> None:
    made = []
    items = prefetch((made.append(i) or i for i in count()), 4)
    for taken in range(1, 20):
        next(items)
        wait_until(lambda expected=taken + 4: len(made) == expected)
    time.sleep(0.01)
    assert len(made) == 19 + 4
    items.close()


def faulty() -> Iterator[int]:
    yield 1
    yield 2
    raise FileNotFoundError("the shard is gone")


def test_an_exception_comes_after_the_items_before_it_with_its_traceback() -> None:
    items = prefetch(faulty(), 10)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(FileNotFoundError, match="the shard is gone") as caught:
        next(items)
    assert "faulty" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(StopIteration):
        next(items)


def test_an_exception_of_the_consumer_ends_the_thread() -> None:
    def consume() -> None:
        for _ in prefetch(count(), 2):
            raise KeyError("in the training loop")

    with pytest.raises(KeyError):
        consume()
