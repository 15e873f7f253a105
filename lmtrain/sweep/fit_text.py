"""Fits for people: each number with its interval, each doubt in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmtrain.scaling import LEVEL, Fitted, distinct
from lmtrain.scaling.search import LEAST, MOST
from lmtrain.sweep.seeds import Difference, telling
from lmtrain.table import table

if TYPE_CHECKING:
    from lmtrain.sweep.fit import MixerFit, SweepFit


def format_fits(fits: SweepFit) -> str:
    """The text of `lmtrain sweep fit`."""
    c = fits.collected
    head = f"{c.name}: {len(c.runs)} runs, losses in {c.unit.name}, intervals of {LEVEL:.0%}"
    blocks = [f"{head}\n{c.unit.note}" if c.unit.note else head]
    if c.claimed:
        names = ", ".join(run.name for run in c.claimed)
        blocks.append(f"left out, since one pass of a model that sees ahead is no code length: {names}")
    blocks += [f"{_names(same)}\n{_indented(fit_lines(same[0]))}" for same in _alike(fits.fits)]
    if fits.differences:
        blocks.append(differences_table(fits.differences, c.unit.name))
    return "\n\n".join(blocks)


def _alike(fits: Sequence[MixerFit]) -> list[list[MixerFit]]:
    """Each fit by itself, but those that failed for one reason together."""
    groups: dict[str, list[MixerFit]] = {}
    for fit in fits:
        groups.setdefault("\n".join(fit_lines(fit)) if fit.refusal else fit.mixer, []).append(fit)
    return list(groups.values())


def _names(fits: list[MixerFit]) -> str:
    return ", ".join(f"{fit.mixer or 'all'} ({len(fit.runs)} runs)" for fit in fits)


def _indented(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def fit_lines(fit: MixerFit) -> list[str]:
    """What is known of one mixer."""
    lines = []
    if fit.outdone:
        names = ", ".join(run.name for run in fit.outdone)
        lines.append(f"without runs that an equal one beat by another setting: {names}")
    if fit.refusal:
        lines.append(fit.refusal)
    for number, law in enumerate(fit.laws):
        lines += _law_lines(fit, law, better=number == 0 and len(fit.laws) > 1)
    if fit.parabolas.exponent is not None:
        exponent = f"{fit.parabolas.exponent:.3f}"
        lines.append(f"IsoFLOP parabolas, for comparison: N* grows as C^{exponent} (biased even without noise)")
    return lines


def _law_lines(fit: MixerFit, law: Fitted, better: bool) -> list[str]:
    form = law.form
    lines = [f"{form.formula}{', the better one on the held-out runs' if better else ''}"]
    lines.append("  " + ", ".join(f"{name} {law.interval(name)}" for name in form.names))
    exponent = law.interval("n*")
    least, most = fit.factor[1:]
    lines.append(f"  N*(C) grows as C^{exponent}, were C = k N D (in these runs k is {least:.3g} to {most:.3g})")
    if distinct(law.points.rho) == 1:
        best = law.best_size(fit.budget, fit.factor[0])
        lines.append(f"  at {fit.budget:.3g} FLOPs, 10 times the largest run: N* {best}")
    held = law.held_out_error
    error = f"{held:.2%} on the {law.held_out.size} largest runs" if held is not None else "unknown: too few runs"
    lines.append(f"  scatter {law.scatter:.2%}; held-out error {error}")
    return lines + [f"  {doubt}" for doubt in doubts(fit, law)]


def doubts(fit: MixerFit, law: Fitted) -> list[str]:
    """Why the law may say less than it seems."""
    found = [
        f"{name}, or an end of its interval, is at the edge of what is searched: these runs do not determine it"
        for name in ("a", "b")
        if not all(1.01 * LEAST < number < 0.99 * MOST for number in law.interval(name))
    ]
    if law.interval("E").value == 0:
        found.append("E is 0: these runs do not tell the loss that no size and no tokens would lower")
    found += [
        f"the loss does not fall with {what} in these runs"
        for name, what in (("A", "N"), ("B", "D"))
        if law.interval(name).value == 0
    ]
    if law.outliers.any():
        names = ", ".join(run.name for run, out in zip(fit.runs, law.outliers, strict=True) if out)
        found.append(f"far from the law, and counted less: {names}")
    return found


def differences_table(differences: Sequence[Difference], unit: str) -> str:
    """Paired differences with their intervals."""
    shown, left_out = telling(differences)
    told = table(Difference.head(unit), [difference.cells() for difference in shown])
    return "\n".join(filter(None, [f"Each variant minus {differences[0].other}:", told, left_out]))
