"""Who waits is told how long; who need not wait is not told."""

from lmtrain.waiting import EVERY, PATIENCE, Waiting


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(calls: list[tuple[float, str, int, int]]) -> list[str]:
    """What is said if each call comes at its time."""
    said: list[str] = []
    clock = Clock()
    waiting = Waiting(said.append, clock)
    for when, stage, done, total in calls:
        clock.now = 100.0 + when
        waiting(stage, done, total)
    return said


def test_the_time_left_is_that_of_the_work_left() -> None:
    calls = [(0, "one pass", 0, 100), (PATIENCE, "one pass", 10, 100)]
    assert watched(calls) == ["one pass: 10%, about 0:00:18 left"]


def test_lines_do_not_come_faster_than_they_are_read() -> None:
    calls = [(t, "one pass", t, 1000) for t in range(0, 40)]
    said = watched(calls)
    assert [line.split(":")[1].split("%")[0].strip() for line in said] == ["0", "2", "3"]
    assert EVERY == 15


def test_what_is_soon_over_says_nothing() -> None:
    assert watched([(0, "one pass", 0, 10), (1, "one pass", 9, 10), (1.1, "one pass", 10, 10)]) == []
    assert watched([(0, "one pass", 0, 10), (3, "one pass", 9, 10), (3.5, "one pass", 10, 10)]) == []


def test_a_new_stage_is_told_at_once_by_the_pace_of_the_last() -> None:
    calls = [(0, "one pass", 0, 10), (1, "one pass", 10, 10), (1, "512 prefixes", 0, 100)]
    assert watched(calls) == ["512 prefixes: 0%, about 0:00:10 left"]
