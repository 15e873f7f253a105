"""Which figures a comparison of runs deserves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise

import numpy as np

from lmtrain.report.chart import Chart, Point, Series
from lmtrain.scaling import Fitted, Points, budgets, distinct
from lmtrain.sweep.comparison import Collected
from lmtrain.sweep.fit import MixerFit, SweepFit
from lmtrain.sweep.result import RunResult
from lmtrain.sweep.seeds import Cell, Variants

STATE_LENGTH = 65536
"""Tokens at which decode states are compared."""
BEYOND = 4.0
"""How far a law is drawn beyond the runs, in tokens or FLOPs."""
CURVE = 40  # points of a line


def figures(fits: SweepFit) -> list[Chart]:
    """Those with something to show, in the order of the page."""
    collected, variants = fits.collected, Variants(fits.collected)
    found = [variants_chart(collected, variants), *_by_flops(collected, variants)]
    for fit in fits.fits:
        found += [*_isoflop(collected, fit), *_law(collected, fit)]
    found += [*_best_sizes(fits), *_sparsity(collected)]
    for name, what, of in PRICES:
        found += _pareto(collected, variants, name, what, of)
    return found


def state_bytes(run: RunResult) -> float:
    """Of one sequence of `STATE_LENGTH` tokens; 0 if nobody measured it."""
    return float(run.state_bytes.get(str(STATE_LENGTH), 0))


Price = Callable[[RunResult], float]

PRICES: tuple[tuple[str, str, Price], ...] = (
    ("time", "training time (seconds)", lambda run: run.seconds),
    ("memory", "peak memory of training (bytes)", lambda run: float(run.peak_memory)),
    ("state", f"decode state at {STATE_LENGTH:,} tokens (bytes)", state_bytes),
)


def variants_chart(collected: Collected, variants: Variants) -> Chart:
    """The loss of each variant with the interval over its seeds, best first, at the place where most were tried."""
    places = {place: [cell for cell in variants.cells if cell.place == place] for place in variants.places}
    place = max(places, key=lambda place: len(places[place]))
    ranked = sorted(places[place], key=lambda cell: cell.mean(collected.loss).value)
    series = [_row(collected, cell, row, variants.names.index(cell.variant)) for row, cell in enumerate(ranked)]
    rows = [cell.variant for cell in ranked]
    title = f"Loss and its 95 % over seeds: {place}"
    return Chart("variants", title, collected.unit.name, "", series, rows=rows)


def _row(collected: Collected, cell: Cell, row: int, colour: int) -> Series:
    mean = cell.mean(collected.loss)
    whiskers = [] if mean.half is None else [(mean.value - mean.half, row, mean.value + mean.half, row)]
    return Series("", colour, [Point(mean.value, row, f"{cell.variant}: {mean}")], whiskers=whiskers)


def _by_flops(collected: Collected, variants: Variants) -> Iterator[Chart]:
    """Every run, where FLOPs differ."""
    if distinct(np.array([run.flops for run in collected.runs])) < 2:
        return
    series = [
        Series(name, number, [_point(collected, run, run.flops) for run in runs])
        for number, name in enumerate(variants.names)
        if (runs := [run for run in collected.runs if variants.label(run) == name])
    ]
    yield Chart("flops", "Loss against training FLOPs", "FLOPs", collected.unit.name, series, log_x=True)


def _point(collected: Collected, run: RunResult, x: float) -> Point:
    return Point(x, collected.loss(run), f"{run.name}: {collected.loss(run):.4f}")


def _isoflop(collected: Collected, fit: MixerFit) -> Iterator[Chart]:
    """Loss against size at each budget with three sizes, and its parabola."""
    series: list[Series] = []
    for number, parabola in enumerate(fit.parabolas.parabolas):
        runs = [fit.runs[index] for index in parabola.members]
        series.append(
            Series(f"{parabola.C:.2g} FLOPs", number, [_point(collected, run, run.parameters) for run in runs])
        )
        N = np.geomspace(*parabola.sizes, CURVE)
        curve = [Point(x, y) for x, y in zip(N, parabola.at(N), strict=True)]
        series.append(Series("", number, curve, marks=False, line=True, dashed=True))
    if series:
        title = f"{_name(collected, fit)}: IsoFLOP curves (parabolas are biased)"
        name = f"isoflop-{collected.mixers.index(fit.mixer)}"
        yield Chart(name, title, "parameters N", collected.unit.name, series, log_x=True)


def _law(collected: Collected, fit: MixerFit) -> Iterator[Chart]:
    """Loss against tokens, a colour for each size (and sparsity), with the law, its band, and what it expects."""
    if not fit.laws:
        return
    law, series = fit.laws[0], []
    runs = sorted(fit.runs, key=_size)
    D = np.geomspace(law.points.D.min(), BEYOND * law.points.D.max(), CURVE)
    for number, (size, equal) in enumerate(groupby(runs, key=_size)):
        label = f"N {size[0]:.3g}" + (f", rho {size[1]:g}" if distinct(law.points.rho) > 1 else "")
        series.append(Series(label, number, [_point(collected, run, run.tokens) for run in equal]))
        asked = Points.of(np.full(CURVE, size[0]), D, np.ones(CURVE), np.full(CURVE, size[1]))
        series.append(_curve(number, D, *law.predict(asked)))
    title = f"{_name(collected, fit)}: the law and its 90 %, to {BEYOND:g} x the tokens"
    name = f"law-{collected.mixers.index(fit.mixer)}"
    yield Chart(name, title, "tokens D", collected.unit.name, series, log_x=True)


def _size(run: RunResult) -> tuple[int, float]:
    return run.parameters, run.sparsity or 1.0


def _curve(colour: int, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, label: str = "") -> Series:
    points = [Point(a, b) for a, b in zip(x, y, strict=True)]
    return Series(label, colour, points, marks=False, line=True, band=list(zip(x, low, high, strict=True)))


def _best_sizes(fits: SweepFit) -> Iterator[Chart]:
    """N*(C) of each mixer whose law has no sparsity in it."""
    series = [
        _best_size(fits.collected, fit, fit.laws[0])
        for fit in fits.fits
        if fit.laws and distinct(fit.laws[0].points.rho) == 1 and 0 < fit.laws[0].interval("n*").value < 1
    ]
    series = [s for s in series if np.isfinite([bound for b in s.band for bound in b]).all()]
    if series:
        title = "Size of least loss N*(C), were C = k N D; bands: 90 %"
        yield Chart("best-size", title, "FLOPs C", "parameters N*", series, log_x=True, log_y=True)


def _best_size(collected: Collected, fit: MixerFit, law: Fitted) -> Series:
    C = [run.flops for run in fit.runs]
    asked = np.geomspace(min(C), BEYOND * max(C), CURVE)
    value, low, high = np.array([law.best_size(c, fit.factor[0]) for c in asked]).T
    return _curve(collected.mixers.index(fit.mixer), asked, value, low, high, _name(collected, fit))


def _sparsity(collected: Collected) -> Iterator[Chart]:
    """Loss against rho at equal FLOPs, by itself for each mixer: a line for each budget with two sparsities."""
    for number, mixer in enumerate(collected.mixers):
        runs = [run for run in collected.of(mixer) if run.sparsity is not None]
        series: list[Series] = []
        for some in budgets(np.array([run.flops for run in runs])):
            equal = [runs[index] for index in some]
            by_rho = {rho: [collected.loss(r) for r in equal if r.sparsity == rho] for rho in _sparsities(equal)}
            if len(by_rho) > 1:
                points = [Point(rho, float(np.mean(losses))) for rho, losses in by_rho.items()]
                series.append(Series(f"{equal[0].flops:.2g} FLOPs", len(series), points, line=True))
        if series:
            title = f"{mixer or collected.name}: loss against sparsity at equal FLOPs (means over seeds and sizes)"
            what, unit, rhos = "sparsity rho = sequence / kept", collected.unit.name, _sparsities(runs)
            yield Chart(f"sparsity-{number}", title, what, unit, series, log_x=True, x_ticks=rhos)


def _sparsities(runs: Sequence[RunResult]) -> list[float]:
    return sorted({float(run.sparsity) for run in runs if run.sparsity is not None})


def _pareto(collected: Collected, variants: Variants, name: str, what: str, of: Price) -> Iterator[Chart]:
    """Loss against a price, means over seeds, with the front: whoever is cheaper than it is worse."""
    series, marks = [], []
    for number, variant in enumerate(variants.names):
        cells = [cell for cell in variants.cells if cell.variant == variant]
        found = [(cell.mean(of).value, cell.mean(collected.loss).value, cell.place) for cell in cells]
        points = [Point(x, y, f"{variant}, {place}: {y:.4f}") for x, y, place in found if x > 0]
        series.append(Series(variant, number, points))
        marks += points
    if len(marks) > 1:
        best = Series("front", 0, _steps(front(marks)), marks=False, line=True, dashed=True)
        title = f"Pareto front: loss against {what.partition(' (')[0]}"
        yield Chart(f"pareto-{name}", title, what, collected.unit.name, [best, *series], log_x=True)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both, by rising x."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not found or point.y < found[-1].y:
            found.append(point)
    return found


def _steps(points: Sequence[Point]) -> list[Point]:
    """A line that falls only where somebody stands: between two runs nobody has been."""
    corners = [Point(after.x, before.y) for before, after in pairwise(points)]
    return [*points[:1], *(point for pair in zip(corners, points[1:], strict=True) for point in pair)]


def _name(collected: Collected, fit: MixerFit) -> str:
    return fit.mixer or collected.name
