"""The results for people: tables of a line per subject and a column per length, and sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmtrain.bench.curves import growth
from lmtrain.bench.measure import environment
from lmtrain.bench.order import Order
from lmtrain.bench.results import Pass, Results, Row, seconds
from lmtrain.bench.subjects import PARTS, Part
from lmtrain.bench.tiles import Waste, format_waste
from lmtrain.bench.verdict import LEGEND, faster_from, speed_up, verdicts
from lmtrain.table import table

TITLES: dict[Part, str] = {"mixer": "Whole mixers", "attention": "Attention alone"}
PASSES: dict[Pass, str] = {"forward": "forward", "both": "forward + backward"}


def format_results(order: Order, results: Results, tiles: list[Waste]) -> str:
    """Times, memory, pairs, tiles, then what follows from them, and what was skipped."""
    blocks = [_head(order)]
    for part in PARTS:
        if results.names(part):
            blocks += [_times(results, part, which) for which in PASSES]
            blocks.append(_memory(results, part))
    blocks += [_pairs(results), format_waste(tiles)]
    for name, sentences in verdicts(results.comparisons()).items():
        blocks.append("\n  ".join([name, *sentences]))
    blocks += [_spread(results), "\n".join(map(str, results.skipped))]
    return "\n\n".join(block for block in blocks if block)


def _head(order: Order) -> str:
    seen = environment()
    device = (
        ", ".join(seen["gpus"]) if order.device.type == "cuda" else f"{seen['processor']}, {seen['threads']} threads"
    )
    return (
        f"{device}, torch {seen['torch']}; {order.dtype}, one sequence, {order.dim} wide; "
        f"median of {order.repeats} repeats in turn after a warm-up\n{LEGEND}"
    )


def _times(results: Results, part: Part, which: Pass) -> str:
    def cell(row: Row) -> str:
        c = results.comparison(row.name, part)
        beside = f" ({speed_up(c, row.length, which)})" if c and row.length in c.lengths else ""
        return f"{1e3 * getattr(row, which).median:,.1f}{beside}"

    def last(name: str) -> list[str]:
        power = growth(seconds(results.of(name, part), which))
        c = results.comparison(name, part)
        return ["" if power is None else f"T^{power:.2f}", faster_from(c, which) if c else ""]

    return _matrix(results, f"{TITLES[part]}, {PASSES[which]}: ms", part, cell, ["growth", "faster from"], last)


def _memory(results: Results, part: Part) -> str:
    title = f"{TITLES[part]}, peak memory of forward + backward beside inputs and weights: MiB"
    return _matrix(results, title, part, lambda row: f"{row.peak_bytes / 2**20:,.1f}")


def _pairs(results: Results) -> str:
    def cell(row: Row) -> str:
        c = results.comparison(row.name, "mixer")
        bound = f" ({c.bound(row.length):.2f}x)" if c and row.length in c.lengths else ""
        return f"{row.pairs / row.length:,.0f}{bound}"

    title = "Living (query, key) pairs per token, over all heads (x that they alone would allow)"
    return _matrix(results, title, "mixer", cell)


def _matrix(
    results: Results,
    title: str,
    part: Part,
    cell: Callable[[Row], str],
    more: Sequence[str] = (),
    last: Callable[[str], list[str]] = lambda name: [],
) -> str:
    """A line per subject: a cell per length, then what follows from the whole line, under the heads `more`."""
    lengths = results.lengths
    lines = []
    for name in results.names(part):
        rows = results.of(name, part)
        lines.append([name, *(cell(rows[n]) if n in rows else "" for n in lengths), *last(name)])
    return f"{title}\n" + table([part, *(f"T={n:,}" for n in lengths), *more], lines) if lines else ""


def _spread(results: Results) -> str:
    """How far the repeats of one call lie apart."""
    found = [(getattr(row, which).spread, row, which) for row in results.rows for which in PASSES]
    if not found:
        return ""
    spread, row, which = max(found, key=lambda each: each[0])
    where = f"{row.name} ({row.part}), {PASSES[which]}, {row.length:,} tokens"
    return f"From the least to the greatest repeat it is at most {spread:.0%} of the median: {where}."
