"""Time and memory of a call, so that the numbers can be compared; and what they depend on."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from lmtrain.run.environment import processor

CPU = torch.device("cpu")

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, least and most of its repeats."""

    median: float
    least: float
    most: float

    @property
    def spread(self) -> float:
        """Width of the repeats as a share of their median."""
        return (self.most - self.least) / self.median


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_in_turn(
    runs: Mapping[Name, Callable[[], Any]], repeats: int, device: torch.device = CPU
) -> dict[Name, Timing]:
    """Times of calls that are warm already, taken in turn, so that a drift of the machine meets all alike."""
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = now(device)
            run()
            seconds[name].append(now(device) - begin)
    return {name: Timing(statistics.median(taken), min(taken), max(taken)) for name, taken in seconds.items()}


def peak_bytes(run: Callable[[], Any], device: torch.device = CPU) -> int:
    """The most bytes that `run` holds at one time beside what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    return max(itertools.accumulate(_allocations(run)), default=0)


def largest_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the largest single piece of memory that `run` asks for on the CPU: of its largest tensor."""
    return max(_allocations(run), default=0)


def _allocations(run: Callable[[], Any]) -> list[int]:
    """Changes of the bytes that are held on the CPU, in the order of time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each start and stop is a line on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    return [change for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]


def environment() -> dict[str, Any]:
    """What the numbers depend on; no names of hosts, people or folders."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv),
        "processor": processor(),
        **({"gpus": gpus} if gpus else {}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
