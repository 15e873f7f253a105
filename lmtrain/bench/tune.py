"""The static table of the kernels' configurations, measured on the user's own GPU.

From the shipped row of each kernel one setting at a time is changed, and what is fastest is kept, until no change
gains. Whatever does not compile, does not fit, or computes other numbers is left out. Nothing is tuned while a model
trains: the library reads the table that this writes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention.kernels.configs import (
    ENVIRONMENT,
    KERNELS,
    Config,
    Kernel,
    Kind,
    architecture,
    find_config,
    trying,
    write_table,
)
from attention.lifetimes import FOREVER, Lifetimes, causal, window
from attention.ops.attend import attend
from lmtrain.bench.measure import environment, timed_in_turn
from lmtrain.bench.order import TABLE, Order
from lmtrain.bench.subjects import heads_of
from lmtrain.table import table
from parallel.engine import DTYPES

CHOICES: dict[str, tuple[Any, ...]] = {
    "queries": (16, 32, 64, 128),
    "keys": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
    "two_loops": (False, True),
}
GAIN = 0.98  # a row changes only for less than this share of its time
HEADS, LENGTH = 16, 8192
TOLERANCES: dict[Kind, float] = {"half": 2e-2, "single": 1e-4}

Race = Callable[[Sequence[Config]], dict[Config, float]]
"""Configurations -> seconds of those that run."""


@dataclass(frozen=True)
class Tuned:
    """A row of the table: as it was and as it is now, with the seconds of both in their last race."""

    kernel: Kernel
    kind: Kind
    width: int
    before: Config
    after: Config
    seconds_before: float
    seconds_after: float


@dataclass(frozen=True)
class Tuning:
    """What was tuned, and where the table lies."""

    rows: list[Tuned]
    path: Path

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "environment": environment(),
            "variable": ENVIRONMENT,
            "table": str(self.path),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def format(self) -> str:
        """For people."""
        head = ["kernel", "kind", "width", "before", "after", "ms before", "ms after"]
        lines = [
            [r.kernel, r.kind, str(r.width), _words(r.before), _words(r.after)]
            + [f"{1e3 * seconds:.3f}" for seconds in (r.seconds_before, r.seconds_after)]
            for r in self.rows
        ]
        return f"{table(head, lines)}\n\nTo use it: export {ENVIRONMENT}={self.path.absolute()}"


def tune(order: Order, say: Callable[[str], None]) -> Tuning:
    """Tune the kernels for the type and the head widths of the ordered mixers. The table is written into `order.out`,
    after each row anew.
    """
    dtype, device, repeats, path = DTYPES[order.dtype], order.device, order.repeats, order.out / TABLE
    kind: Kind = "single" if dtype == torch.float32 else "half"
    shapes = [heads_of(settings, order.dim) for settings in order.mixers.values()]
    widths = sorted({max(16, 2 ** math.ceil(math.log2(shape.width))) for shape in shapes})
    tuning = Tuning([], path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for width in widths:
        calls = _calls(width, dtype, device)
        for kernel in KERNELS:
            say(f"{kernel}, {kind}, heads of {width}")
            before = find_config(kernel, kind, width, on=architecture(device))
            after, seconds = descend(before, race_of(kernel, kind, width, calls, repeats, device, say))
            tuning.rows.append(Tuned(kernel, kind, width, before, after, seconds[before], seconds[after]))
            on = architecture(device)
            write_table({(on, row.kernel, row.kind, row.width): row.after for row in tuning.rows}, path)
    return tuning


def descend(start: Config, race: Race) -> tuple[Config, dict[Config, float]]:
    """The fastest configuration that single changes lead to, and seconds, of which those of start and best compare."""
    best, tried = start, {start}
    while candidates := [config for config in neighbours(best) if config not in tried]:
        tried.update(candidates)
        seconds = race([start, best, *candidates])
        fastest = min(seconds, key=lambda config: seconds[config])
        if seconds[fastest] >= GAIN * seconds[best]:
            return best, seconds
        best = fastest
    return best, race([start, best])


def neighbours(config: Config) -> Iterator[Config]:
    """All that differ in one setting."""
    for name, values in CHOICES.items():
        for value in values:
            if value != getattr(config, name):
                yield dataclasses.replace(config, **{name: value})


@dataclass(frozen=True)
class Calls:
    """The work that a configuration is judged by: `attend` forward, and backward from what forward left."""

    forward: list[Callable[[], Sequence[Tensor]]]
    backward: list[Callable[[], Sequence[Tensor]]]


def race_of(
    kernel: Kernel, kind: Kind, width: int, calls: Calls, repeats: int, device: torch.device, say: Callable[[str], None]
) -> Race:
    """Times configurations of one kernel on every call in turn: geometric means."""
    work = calls.forward if kernel == "forward" else calls.backward
    truth = [call() for call in work]

    def run(config: Config, call: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        with trying((architecture(device), kernel, kind, width), config):
            return call()

    def runs_right(config: Config) -> bool:
        try:
            pairs = [(run(config, call), right) for call, right in zip(work, truth, strict=True)]
        except Exception as error:  # a compiler, an assembler or a launch says so in its own way
            say(f"  {_words(config)}: {next(iter(str(error).splitlines()), type(error).__name__)}")
            return False
        wrong = max(_relative_error(x, y) for found, right in pairs for x, y in zip(found, right, strict=True))
        if wrong > TOLERANCES[kind]:
            say(f"  {_words(config)}: wrong by {wrong:.2g}")
            return False
        return True

    def race(configs: Sequence[Config]) -> dict[Config, float]:
        right = [config for config in dict.fromkeys(configs) if runs_right(config)]
        runs = {(c, n): (lambda c=c, call=call: run(c, call)) for c in right for n, call in enumerate(work)}
        times = timed_in_turn(runs, repeats, device)
        return {c: math.exp(sum(math.log(times[c, n].median) for n in range(len(work))) / len(work)) for c in right}

    return race


def _calls(width: int, dtype: torch.dtype, device: torch.device) -> Calls:
    """Dense, a window, and immortals among mortals: whole tiles, masked ones, two generations."""
    shape = (1, HEADS, LENGTH, width)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    dout = torch.randn(shape, dtype=dtype, device=device)
    token = torch.arange(LENGTH, device=device)
    summaries = torch.where(token % 128 >= 96, FOREVER, (token // 128 + 1) * 128)
    lives = [causal(LENGTH, device), window(LENGTH, 1024, device), Lifetimes(token.int(), summaries.int())]

    def forward(life: Lifetimes) -> Callable[[], Sequence[Tensor]]:
        def call() -> Sequence[Tensor]:
            with torch.no_grad():
                return attend(q, k, v, life, implementation="triton")

        return call

    def backward(life: Lifetimes) -> Callable[[], Sequence[Tensor]]:
        out, _ = attend(q, k, v, life, implementation="triton")
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    return Calls([forward(life) for life in lives], [backward(life) for life in lives])


def _relative_error(found: Tensor, right: Tensor) -> float:
    """L2; what is no number is infinitely wrong."""
    error = float((found.double() - right.double()).norm() / right.double().norm())
    return error if math.isfinite(error) else math.inf


def _words(config: Config) -> str:
    loops = "two loops" if config.two_loops else "one loop"
    return f"{config.queries} x {config.keys}, {config.warps} warps, {config.stages} stages, {loops}"
