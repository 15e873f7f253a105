"""What a person sees of a run: one live line on a terminal, plain lines elsewhere, all of them in log.txt; its pace."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO


class Nowhere(io.TextIOBase):
    """Where those speak whom nobody is to hear."""

    def write(self, text: str) -> int:
        return len(text)


class Progress:
    """Writes to `stream`; `keep` is called with every line that is not merely live.

    What the stream does not take, say a file on a full disk, is lost: no run ends for it.
    """

    def __init__(self, stream: TextIO | Nowhere | None = None, keep: Callable[[str], None] = lambda line: None) -> None:
        self.stream: Any = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.keep = keep
        self._shown = 0

    def note(self, line: str) -> None:
        """A line that stays."""
        cleared = "\r" + " " * self._shown + "\r" if self._shown else ""
        self._shown = 0
        self._say(f"{cleared}{line}\n")
        self.keep(line)

    def update(self, line: str, logged: bool) -> None:
        """The state of the run; `logged` lines are kept, the others only pass by on a terminal."""
        if self.live:
            self._say("\r" + line.ljust(self._shown))
            self._shown = len(line)
        elif logged:
            self._say(f"{line}\n")
        if logged:
            self.keep(line)

    def _say(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)
            self.stream.flush()


class Stopwatch:
    """Seconds spent inside `with`, and how often."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to zero."""
        self.total, self.laps = 0.0, 0

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.total += time.perf_counter() - self._begin
        self.laps += 1


@dataclass(frozen=True)
class Pace:
    """What a line says beyond the row: bits per byte, of a text; flops per second, and the most the device reaches if
    that is known; bytes of memory; seconds left."""

    steps: int
    bits_per_byte: float | None
    flops: float
    peak_flops: float | None
    memory: float
    seconds_left: float


def step_line(row: dict[str, Any], pace: Pace) -> str:
    """One line about a training step; row: see `metrics.jsonl`."""
    used = f"{pace.flops / pace.peak_flops:.0%} mfu" if pace.peak_flops else f"{si(pace.flops)}FLOP/s"
    bits = "" if pace.bits_per_byte is None else f"  {pace.bits_per_byte:.3f} bpb"
    mark = "" if row["causality"] == "strict" else " (sees ahead)" if not bits else " (both see ahead)"
    parts = [
        f"step {row['step']}/{pace.steps}",
        f"loss {row['loss']:.4f}{bits}{mark}",
        f"lr {row['lr']:.1e}",
        f"|g| {row['grad_norm']:.2f}",
        f"{si(row['tokens_per_second'])} tok/s",
        used,
        f"{pace.memory / 1e9:.1f} GB",
        f"eta {timedelta(seconds=round(pace.seconds_left))}",
    ]
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']}")
    return "  ".join(parts)


def si(number: float) -> str:
    """Three significant digits with a decimal prefix: 41200 -> 41.2k."""
    if not math.isfinite(number):
        return str(number)
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}P"
