"""What the watch sees in what the ranks tell each other, by a clock that the test turns."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from parallel import watchdog
from parallel.watchdog import Watchdog
from parallel.world import World


class Board:
    """A store of one process."""

    def __init__(self) -> None:
        self.words: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.words[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.words[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.words[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.words for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.words.setdefault(key, value.encode())


class Watched:
    """Three ranks that talk, each with its watch, and the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 60.0) -> None:
        self.now, board = 1000.0, Board()
        self.silent: set[int] = set()
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(sleep=lambda seconds: self.pass_by(watchdog.PERIOD)))
        self.ranks = [Watchdog(World(rank, 3), seconds, clock=lambda: self.now) for rank in range(3)]
        self.told: list[tuple[int, str]] = []
        for rank, each in enumerate(self.ranks):
            each._store = board  # type: ignore[assignment]
            each._say()
            each.on_failure = lambda reason, rank=rank: self.told.append((rank, reason))
        for each in self.ranks:
            each._look()

    def pass_by(self, seconds: float) -> dict[int, str]:
        """Let time pass; the reasons that ranks have to end, as each of them sees it first."""
        found: dict[int, str] = {}
        for _ in range(round(seconds / watchdog.PERIOD)):
            self.now += watchdog.PERIOD
            for rank, each in enumerate(self.ranks):
                if rank not in self.silent:
                    each._say()
                    if reason := each._look():
                        found.setdefault(rank, reason)
        return found

    def all_at(self, place: str) -> None:
        for each in self.ranks:
            each.at(place)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_who_lives_may_be_slow_before_the_first_place(watched: Watched) -> None:
    assert watched.pass_by(1000) == {}
    watched.ranks[0].at("step 1")
    assert watched.pass_by(1000) == {}, "the others are not there yet"


def test_a_silent_rank_is_named_by_all_others(watched: Watched) -> None:
    watched.all_at("step 7")
    watched.silent = {1}
    assert watched.pass_by(59) == {}
    found = watched.pass_by(2)
    assert found.keys() == {0, 2}
    assert (
        found[2]
        == "nothing was heard for 60 s of rank 1 (last seen at the start): stopped, or gone; rank 2 is at step 7"
    )


def test_who_does_not_come_is_named(watched: Watched) -> None:
    watched.all_at("step 7")
    watched.ranks[0].at("the update")
    watched.ranks[2].at("the update")
    watched.pass_by(59)
    watched.ranks[2].world.calls.number += 1
    assert watched.pass_by(59) == {}, "somebody came further"
    reasons = set(watched.pass_by(3).values())
    assert len(reasons) == 3
    assert all("rank 1 (last seen at step 7) did not come any further for 60 s" in reason for reason in reasons)


def test_a_collective_tells_apart_who_has_entered_it(watched: Watched) -> None:
    watched.all_at("the update")
    watched.ranks[0].world.calls.number += 1
    watched.ranks[1].world.calls.number += 1
    assert watched.pass_by(62)[0].startswith("rank 2 (last seen at the update) did not come any further")


def test_nobody_is_blamed_if_all_are_there(watched: Watched) -> None:
    watched.all_at("the update")
    assert watched.pass_by(62)[1] == "no rank came any further for 60 s: all are at the update"


def test_a_job_that_was_suspended_as_a_whole_goes_on(watched: Watched) -> None:
    watched.all_at("step 7")
    watched.pass_by(50)
    watched.now += 10_000
    assert watched.pass_by(50) == {}
    watched.all_at("step 8")
    assert watched.pass_by(50) == {}


def test_what_fails_on_one_rank_ends_the_others_in_a_while(watched: Watched) -> None:
    watched.all_at("step 7")
    assert watched.ranks[1].fail("OSError: no disk") == "rank 1 is at step 7: OSError: no disk"
    assert watched.ranks[2].fail("connection closed") == "rank 1 is at step 7: OSError: no disk"
    assert watched.told == [], "the first rank lives: it is to say so"
    assert watched.pass_by(watchdog.GRACE - 1) == {}
    assert watched.pass_by(2)[0] == "rank 1 is at step 7: OSError: no disk"
    assert watched.ranks[0].fail("connection closed") == "rank 1 is at step 7: OSError: no disk"
    assert watched.ranks[0].fail("and again") == "rank 1 is at step 7: OSError: no disk"
    assert watched.told == [(0, "rank 1 is at step 7: OSError: no disk")]


def test_who_is_gone_is_to_blame_for_a_lost_connection(watched: Watched) -> None:
    watched.all_at("step 7")
    watched.pass_by(1)
    watched.silent = {0}
    reason = watched.ranks[1].fail("connection closed")
    assert reason == "rank 0 (last seen at step 7) ended without a word; rank 1 is at step 7"
    assert watched.told == [(1, reason)], "the lowest rank that is left says so"
    assert watched.ranks[2].fail("connection closed") == reason
    assert len(watched.told) == 1


@pytest.fixture(autouse=True)
def _no_traceback_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)


def test_alone_a_failure_is_told_and_nothing_else_happens() -> None:
    told: list[Any] = []
    with Watchdog(World(), 1.0) as alone:
        alone.on_failure = told.append
        alone.at("step 1")
        assert alone.fail("OSError") == "OSError"
        assert not alone._thread.is_alive()
    assert told == ["OSError"]
    assert json.loads(json.dumps(watchdog.Said(1, 2, "here"))) == [1, 2, "here"]
