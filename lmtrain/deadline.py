"""A time limit of this process: when to stop, so that the last checkpoint is complete before it."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable

RECENT = 16
"""Steps of which the slowest says how long the next one may take: the first ones, which compile, are forgotten."""
SECONDS_TO_END = 1.0
SLOW_DISK = 100e6
"""Bytes per second that any disk writes: the least that a checkpoint is expected to take, before one was timed."""
_WORDS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?|(\d+)", re.ASCII)
_SECONDS = (86400, 3600, 60, 1, 1)


def seconds_of(text: str) -> int:
    """The seconds of `3600`, `90s`, `1h30m` or `2d`. ValueError if it is none of these, or nothing."""
    found = _WORDS.fullmatch(text)
    if found is None or len(text) > 20:
        raise ValueError(f"{text!r} must be a time: seconds, or days, hours, minutes and seconds as 1h30m or 2d")
    total = sum(unit * int(number or 0) for unit, number in zip(_SECONDS, found.groups(), strict=True))
    if total == 0:
        raise ValueError(f"{text!r} is no time at all; null = no limit")
    return total


class Deadline:
    """`seconds` from now, None: never. It is told how long things take, and is near when a step and a save might no
    longer fit."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ends = None if seconds is None else now() + seconds
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._save = 0.0

    def expect_save(self, size: int) -> None:
        """A checkpoint will have `size` bytes."""
        self.took_save(size / SLOW_DISK)

    def took_step(self, seconds: float) -> None:
        """A step took so long, with its wait for data."""
        self._steps.append(seconds)

    def took_save(self, seconds: float) -> None:
        """A checkpoint took so long until it was complete."""
        self._save = max(self._save, seconds)

    @property
    def reserve(self) -> float:
        """Seconds before the end at which to stop: twice those of a slow step and a slow save, and some to end in."""
        return 2 * (max(self._steps, default=0.0) + self._save) + SECONDS_TO_END

    def is_near(self) -> bool:
        """Whether to stop now."""
        return self._ends is not None and self._now() + self.reserve >= self._ends
