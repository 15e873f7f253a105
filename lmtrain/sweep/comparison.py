"""What a sweep's folder holds: finished runs, failed ones, and in which unit their losses may be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtrain.sweep.folder import MARKER, read_marker
from lmtrain.sweep.result import VERSION, RunFailure, RunResult

SAME_TOKENS = 1e-3
"""Of runs whose bytes per token differ by a larger share, tokenizers or texts differ."""


@dataclass(frozen=True)
class Unit:
    """In which losses are compared; `note` says why, where that is not plain."""

    name: str
    of: Callable[[RunResult], float]
    note: str = ""


@dataclass(frozen=True)
class Collected:
    """The runs of one comparison, in the order of their names. unit: that all of them share.

    claimed: strict ones and those scored prefix by prefix are in `runs`; these, whose loss one pass of a model that
    sees ahead has claimed, are no code length and take no part.
    """

    name: str
    runs: tuple[RunResult, ...]
    failures: tuple[RunFailure, ...]
    claimed: tuple[RunResult, ...]
    unit: Unit

    def loss(self, run: RunResult) -> float:
        """In the unit."""
        return self.unit.of(run)

    @property
    def mixers(self) -> list[str]:
        """Labels, in order of appearance."""
        return list(dict.fromkeys(run.mixer for run in self.runs))

    def of(self, mixer: str) -> list[RunResult]:
        """Its runs."""
        return [run for run in self.runs if run.mixer == mixer]


def read_sweep(folder: Path) -> Collected:
    """The results below a sweep's folder. ValueError with everything that is wrong there."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; `lmtrain sweep run` makes one with a folder for each run")
    name, problems = _marked(folder)
    runs, failures = [], []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            run, failure = RunResult.read(path), RunFailure.read(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        if run is not None:
            runs.append(run)
        elif failure is not None:
            failures.append(failure)
    if problems:
        raise ValueError(
            "\n".join([*problems, f"{len(problems)} results of {folder} cannot be read; nothing was done"])
        )
    if not runs:
        failed = f" ({len(failures)} failed)" if failures else ""
        raise ValueError(f"{folder}: no finished run in it{failed}; `lmtrain sweep status` says what is to be done")
    return collect(name, runs, failures)


def _marked(folder: Path) -> tuple[str, list[str]]:
    """The name in the folder's sweep.json (else that of the folder), and what is wrong with that file."""
    try:
        found = read_marker(folder)
    except ValueError as error:
        return folder.resolve().name, [str(error)]
    if found is None:
        return folder.resolve().name, []
    version, name = found
    return name, [] if version == VERSION else [
        f"{folder / MARKER}: of version {version!r}, this lmtrain reads {VERSION}"
    ]


def collect(name: str, runs: Iterable[RunResult], failures: Iterable[RunFailure] = ()) -> Collected:
    """Runs that are to be compared. ValueError if they cannot be, or contradict themselves."""
    every = sorted(runs, key=lambda run: run.name)
    if found := [problem for run in every for problem in _contradictions(run)]:
        raise ValueError("\n".join(found))
    honest = tuple(run for run in every if run.strict or run.scoring == "prefix-wise")
    claimed = tuple(run for run in every if run not in honest)
    if not honest:
        raise ValueError(f"{name}: every run sees ahead and was scored in one pass, which is no code length; eval them")
    return Collected(name, honest, tuple(failures), claimed, _unit(honest))


def _contradictions(run: RunResult) -> list[str]:
    """N and D swapped, for one, which no fit would notice: it would only swap its exponents."""
    found = []
    numbers = (run.parameters, run.tokens, run.loss, run.flops)
    if min(numbers) <= 0:
        found.append(f"{run.name}: parameters, tokens, loss and flops must be > 0, got {numbers}")
    elif not math.isclose(run.flops, 3 * run.flops_per_token * run.tokens, rel_tol=0.01):
        swapped = math.isclose(run.flops, 3 * run.flops_per_token * run.parameters, rel_tol=0.01)
        hint = "; parameters and tokens are swapped" if swapped else ""
        found.append(f"{run.name}: flops {run.flops:.4g} are not 3 x flops_per_token x tokens{hint}")
    return found


def _unit(runs: Sequence[RunResult]) -> Unit:
    """Bits per byte where all runs have them, which no tokenizer moves; else nats per token, of one tokenizer."""
    lacking = [run.name for run in runs if run.bits_per_byte is None]
    if not lacking:
        sizes = [run.loss / (math.log(2) * float(run.bits_per_byte or math.inf)) for run in runs]
        note = ""
        if max(sizes) > min(sizes) * (1 + SAME_TOKENS):
            note = (
                f"tokenizers differ ({min(sizes):.3f} to {max(sizes):.3f} bytes per token): losses per token cannot be "
                "compared, bits per byte can; D counts tokens of each run's own tokenizer"
            )
        return Unit("bits per byte", lambda run: float(run.bits_per_byte or math.nan), note)
    if len(lacking) < len(runs):
        raise ValueError(
            f"{', '.join(lacking)}: no bits_per_byte, which the other runs have, so nobody can tell whether tokenizers "
            "are the same; score them again, or compare the rest alone"
        )
    return Unit("nats per token", lambda run: run.loss, "no run says bits per byte: one tokenizer is taken for granted")


def axes_that_change(runs: Sequence[RunResult], of: Callable[[RunResult], Hashable]) -> set[str]:
    """Axes along which `of` differs between two runs that are equal on every other axis."""
    found = set()
    for axis in {axis for run in runs for axis in run.axes}:
        seen: dict[Hashable, set[Hashable]] = {}
        for run in runs:
            seen.setdefault(place(run, {axis}), set()).add(of(run))
        if any(len(values) > 1 for values in seen.values()):
            found.add(axis)
    return found


def place(run: RunResult, without: set[str]) -> tuple[tuple[str, str], ...]:
    """The run's values on all other axes."""
    return tuple(sorted((axis, str(value)) for axis, value in run.axes.items() if axis not in without))


def mixer_axes(runs: Sequence[RunResult]) -> set[str]:
    """Axes whose value is the label of the mixer, in every run that has them."""
    axes = {axis for run in runs for axis in run.axes}
    return {axis for axis in axes if all(run.axes.get(axis, run.mixer) == run.mixer for run in runs)}


def flat(run: RunResult) -> dict[str, Any]:
    """The run as a row of plain values, for CSV: axes and state sizes each in a column of their own."""
    row: dict[str, Any] = {"name": run.name, "mixer": run.mixer, "seed": run.seed}
    row |= {f"axis {axis}": value for axis, value in run.axes.items()}
    for name in (
        "parameters",
        "parameters_total",
        "tokens",
        "flops",
        "flops_per_token",
        "pairs",
        "loss",
        "bits_per_byte",
    ):
        row[name] = getattr(run, name)
    for name in ("sparsity", "strict", "scoring", "seconds", "tokens_per_second", "peak_memory", "group", "hash"):
        row[name] = getattr(run, name)
    return row | {f"state_bytes {length}": size for length, size in run.state_bytes.items()}
