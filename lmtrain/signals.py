"""SIGTERM, Ctrl-C and a time limit ask a run to stop: saved at the next step boundary. A second signal ends it at once.

Of several ranks it does not matter which one is asked, or whether all are.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from lmtrain.deadline import Deadline
from parallel.world import ALONE, World


class StopRequest:
    """While entered, remembers the first SIGTERM or SIGINT; the second has its usual effect.

    deadline: asks to stop, too, when it is near.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    TIME_IS_UP = 1 << 16  # no signal has this number

    def __init__(self, world: World = ALONE, deadline: Deadline | None = None) -> None:
        self.world = world
        self.deadline = deadline or Deadline(None)
        self._received = 0  # by this process
        self._agreed = 0  # by any rank, as of the last time they asked
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether any rank was asked to stop. All ranks ask this together, and get the same answer."""
        self._agreed = self.world.largest(self._received or (self.TIME_IS_UP if self.deadline.is_near() else 0))
        return self._agreed != 0

    @property
    def reason(self) -> str:
        """The signal by name, or the setting of the limit, once `asked` said yes."""
        if self._agreed == self.TIME_IS_UP:
            return "train.max_time"
        return signal.Signals(self._agreed).name if self._agreed else ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received = number
            return
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.kill(os.getpid(), number)
