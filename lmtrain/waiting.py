"""How long it will take, told to whoever waits. What is soon over says nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

PATIENCE = 2.0
"""Seconds for which nobody needs to be told."""
EVERY = 15.0
"""Seconds between two lines."""


def to_stderr(line: str) -> None:
    """Where lines go by default: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


class Waiting:
    """Called with a stage and how much of it is done; says the share and the time left.

    A new stage is at first taken to go as fast, unit by unit, as the last one went.
    """

    def __init__(self, say: Callable[[str], None] = to_stderr, clock: Callable[[], float] = time.monotonic) -> None:
        self.say = say
        self.clock = clock
        self.stage = ""
        self.began = 0.0
        self.quiet_until = 0.0
        self.pace: float | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of work."""
        now = self.clock()
        if stage != self.stage:
            self.stage, self.began = stage, now
            self.quiet_until = now if self.pace is not None else now + PATIENCE
        if done and now > self.began:
            self.pace = (now - self.began) / done
        if self.pace is None or now < self.quiet_until:
            return
        left = self.pace * (total - done)
        if left < PATIENCE:
            return
        self.say(f"{stage}: {done / total:.0%}, about {timedelta(seconds=round(left))} left")
        self.quiet_until = now + EVERY
