"""From the folder of a finished sweep over sparsity to the tables and the plot of docs/scaling.md.

    python benchmarks/sparsity_table.py runs/sparsity [--name sparsity] && python benchmarks/fill.py

Writes benchmarks/results/NAME.json, whose tables the second command puts into the pages, and docs/NAME.svg. `rows`: how
the loss of each mixer differs from that of the same mixer at its least sparsity, in pairs of equal size, tokens and
seed. Its 95 % interval (Student's t) is over trunks, since budgets forked from one trunk share its luck; beside it
stands the narrower one of whoever takes every place by itself. `laws`: what `lmtrain sweep fit` finds, with 90 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sweep_results import command_line, keep

from lmtrain.report.chart import Chart, Point, Series
from lmtrain.scaling import Fitted, Mean, mean_of
from lmtrain.sweep.comparison import Collected, read_sweep
from lmtrain.sweep.fit import fit_sweep
from lmtrain.sweep.result import RunResult
from lmtrain.sweep.seeds import EVERYWHERE, Variants

SYMBOLS = ("E", "A", "a", "B", "b", "g", "c")


def thinned(collected: Collected) -> Iterator[tuple[str, Variants]]:
    """Each mixer that was run at several sparsities, by itself: its first variant is that of least sparsity."""
    for mixer in collected.mixers:
        runs = tuple(run for run in collected.of(mixer) if run.sparsity is not None)
        if len({run.sparsity for run in runs}) > 1:
            yield mixer, Variants(replace(collected, runs=runs))


def rows_of(collected: Collected) -> list[dict[str, Any]]:
    """A row for each mixer and sparsity."""
    return [_row(collected, mixer, variants, name) for mixer, variants in thinned(collected) for name in variants.names]


def _row(collected: Collected, mixer: str, variants: Variants, name: str) -> dict[str, Any]:
    largest = max((cell for cell in variants.cells if cell.variant == name), key=lambda cell: _amount(cell.runs[0]))
    alike = [difference for difference in variants.differences() if difference.variant == name]
    everywhere = next((difference for difference in alike if difference.place == EVERYWHERE), None)
    places = [difference.mean.value for difference in alike if difference.place != EVERYWHERE]
    return {
        "mixer": f"`{mixer}`",
        "rho": f"{largest.runs[0].sparsity:g}",
        "minus the least rho": f"{everywhere.mean.value:+.3f}" if everywhere else "",
        "± (trunks)": _half(everywhere.mean) if everywhere else "",
        "trunks": everywhere.mean.count if everywhere else "",
        "p of all": f"{everywhere.p:.2g}" if everywhere and everywhere.p is not None else "",
        "± (places)": _half(mean_of(places)) if places else "",
        "places": len(places) or "",
        f"{collected.unit.name}, {largest.place}": f"{largest.mean(collected.loss).value:.3f}",
        "its N": f"{largest.runs[0].parameters:,}",
    }


def _amount(run: RunResult) -> float:
    return float(run.parameters * run.tokens)


def _half(mean: Mean) -> str:
    return "" if mean.half is None else f"{mean.half:.3f}"


def laws_of(collected: Collected) -> list[dict[str, Any]]:
    """A row for each mixer and law, the better one first."""
    return [_law(fit.mixer, law) for fit in fit_sweep(collected).fits for law in fit.laws]


def _law(mixer: str, law: Fitted) -> dict[str, Any]:
    known = {name: law.interval(name) for name in law.form.names}
    shown = {
        name: f"{value.value:.3g} ({value.low:.2g} to {value.high:.2g})" if (value := known.get(name)) else ""
        for name in SYMBOLS
    }
    held = law.held_out_error
    return {
        "mixer": f"`{mixer}`",
        "L =": f"`{law.form.formula.removeprefix('L = ')}`",
        **shown,
        "scatter": f"{law.scatter:.1%}",
        "held-out error": "unknown" if held is None else f"{held:.1%}",
    }


def chart_of(collected: Collected) -> Chart:
    """Differences from the least sparsity with their intervals over trunks, a line for each mixer."""
    series, tried = [], set[float]()
    for number, (mixer, variants) in enumerate(thinned(collected)):
        rho = {cell.variant: float(cell.runs[0].sparsity or 1) for cell in variants.cells}
        tried |= set(rho.values())
        points = [Point(min(rho.values()), 0.0, f"{variants.baseline}: what the others are compared with")]
        whiskers = []
        for difference in (found for found in variants.differences() if found.place == EVERYWHERE):
            x = rho[difference.variant] * 1.03**number  # side by side, else intervals hide each other
            y, half = difference.mean.value, difference.mean.half or 0.0
            points.append(Point(x, y, f"{difference.variant}: {difference.mean}"))
            whiskers.append((x, y - half, x, y + half))
        series.append(Series(mixer, number, points, line=True, whiskers=whiskers))
    title = "Loss minus that at the least rho, at equal FLOPs; 95 % over trunks"
    what = "sparsity rho = sequence / kept"
    return Chart("sparsity", title, what, collected.unit.name, series, log_x=True, x_ticks=sorted(tried))


def main() -> None:
    """Write JSON and SVG, print the tables."""
    arguments = command_line(__doc__, "sparsity").parse_args()
    collected = read_sweep(arguments.sweep)
    tables = {"rows": rows_of(collected), "laws": laws_of(collected)}
    keep(arguments.name, collected, tables, chart_of(collected))


if __name__ == "__main__":
    main()
