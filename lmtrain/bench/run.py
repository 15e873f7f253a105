"""Measuring, length by length: what fits is warmed up and taken in turn, what does not is skipped aloud."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lmtrain.bench.curves import predicted
from lmtrain.bench.measure import peak_bytes, timed_in_turn
from lmtrain.bench.order import FILES, PLOT, Order
from lmtrain.bench.plot import draw
from lmtrain.bench.report import Report
from lmtrain.bench.results import Results, Row, Skip, seconds
from lmtrain.bench.subjects import Bed, Passes, Subject, UnavailableError, make_subjects
from lmtrain.bench.tiles import LENGTHS as TILES
from lmtrain.bench.tiles import tile_waste
from lmtrain.hardware import free_memory
from parallel.engine import DTYPES

UNTIMED = 2  # passes before those that are timed: warm-up, memory


def bench(order: Order, say: Callable[[str], None]) -> Report:
    """Measure what was ordered and keep it in `order.out`, after each length anew. `say` gets a line on each step."""
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    torch.manual_seed(order.seed)
    bed = Bed(order.device, DTYPES[order.dtype])
    subjects = make_subjects(order.mixers, order.dim, bed)
    say(f"counting the tiles of {TILES[0]:,} to {TILES[-1]:,} tokens")
    report = Report(order, Results(), list(tile_waste(subjects)))
    begin = time.perf_counter()
    for length in order.lengths:
        _measure(subjects, length, order.seconds - (time.perf_counter() - begin), report, bed, say)
        bed.clear()
        report.write()
    try:
        if report.results.rows:
            draw(report.results, order.out / PLOT)
    except ImportError:
        say(f"no {PLOT}: matplotlib is not installed")
    say(f"kept in {order.out}: {', '.join(name for name in FILES if (order.out / name).exists())}")
    return report


def expected_seconds(results: Results, subjects: list[Subject], length: int, repeats: int) -> float:
    """Of all passes at `length`, by the growth so far; 0 at the first one."""
    curves = [seconds(results.of(s.name, s.part), which) for s in subjects for which in ("forward", "both")]
    return (repeats + UNTIMED) * sum(predicted(curve, length) or 0.0 for curve in curves)


def _measure(
    subjects: list[Subject], length: int, left: float, report: Report, bed: Bed, say: Callable[[str], None]
) -> None:
    """Add a row for each subject that runs at this length, if there are so many seconds `left`."""
    order, results = report.order, report.results

    def skip(subject: Subject | None, reason: str) -> None:
        name, part = (subject.name, subject.part) if subject else (None, None)
        results.skipped.append(Skip(length, name, part, reason))
        say(str(results.skipped[-1]))

    expected = expected_seconds(results, subjects, length, order.repeats)
    if expected > max(left, 0):  # at the first length nothing is known
        reason = f"would take about {expected:.0f} s, and {max(left, 0):.0f} of {order.seconds:.0f} are left"
        return skip(None, f"{reason}; give it more --seconds, or fewer --mixers")
    about = f", about {expected:.0f} s" if expected else ""
    say(f"{length:,} tokens: {len(subjects)} subjects, {order.repeats} repeats{about}")
    ready: dict[Subject, tuple[Passes, int]] = {}
    for subject in subjects:
        try:
            _check_memory(results, subject, length, bed.device)
            ready[subject] = _warm(subject, length, bed.device)
        except (UnavailableError, torch.OutOfMemoryError) as error:
            skip(subject, str(error).partition("\n")[0])
    forward = timed_in_turn({s: passes.forward for s, (passes, _) in ready.items()}, order.repeats, bed.device)
    both = timed_in_turn({s: passes.both for s, (passes, _) in ready.items()}, order.repeats, bed.device)
    for subject, (passes, peak) in ready.items():
        results.rows.append(
            Row(
                name=subject.name,
                part=subject.part,
                baseline=subject.baseline,
                length=length,
                forward=forward[subject],
                both=both[subject],
                peak_bytes=peak,
                pairs=subject.pairs(length),
                block_mask_seconds=passes.block_mask_seconds,
            )
        )


def _warm(subject: Subject, length: int, device: torch.device) -> tuple[Passes, int]:
    """The subject's passes, run once so that plans and caches are made; and their peak memory."""
    passes = subject.passes(length)
    passes.forward()
    passes.both()
    return passes, peak_bytes(passes.both, device)


def _check_memory(results: Results, subject: Subject, length: int, device: torch.device) -> None:
    """Raise UnavailableError where the memory will not do: a CPU would not say so, but end the process."""
    peaks = {n: float(row.peak_bytes) for n, row in results.of(subject.name, subject.part).items()}
    need, free = predicted(peaks, length), free_memory(device)
    if need is not None and free is not None and need > free:
        raise UnavailableError(f"would need about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")
