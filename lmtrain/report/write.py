"""`lmtrain sweep report` and `lmtrain report`: the page, and its figures and tables beside it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lmtrain.files import replace_bytes
from lmtrain.report import png
from lmtrain.report.figures import figures
from lmtrain.report.page import page
from lmtrain.report.svg import draw
from lmtrain.sweep.comparison import Collected, flat
from lmtrain.sweep.fit import fit_sweep

PAGE = "report.html"
MARK = "lmtrain report"
"""In every page of ours, so that no other file is replaced."""


def write_report(collected: Collected, folder: Path) -> tuple[Path, list[str]]:
    """Write page, fit.json, runs.csv, and each figure as SVG and PNG; returns the page, and what is missing and why.

    A report that an earlier call left there is replaced. ValueError if the folder holds anything else.
    """
    target = folder / PAGE
    ours = target.is_file() and MARK in target.read_text(errors="replace")[:1000]
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder}: is there and holds no report of ours; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    fits = fit_sweep(collected)
    charts = figures(fits)
    replace_bytes(folder / "runs.csv", to_csv(collected).encode())
    fits.write(folder)
    missing: list[str] = []
    for chart in charts:
        replace_bytes(folder / f"{chart.name}.svg", draw(chart, alone=True).encode())
        if (picture := png.draw(chart)) is not None:
            replace_bytes(folder / f"{chart.name}.png", picture)
        elif not missing:
            missing.append("no PNG: matplotlib is not installed; pip install matplotlib, or take the SVG")
    replace_bytes(target, page(fits, charts).encode())
    return target, missing


def to_csv(collected: Collected) -> str:
    """Runs, a line each; a column for whatever any of them has."""
    rows = [flat(run) for run in (*collected.runs, *collected.claimed)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writerow({name: name for name in names})
    writer.writerows({name: _inert(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _inert(value: object) -> object:
    """A text that a spreadsheet would take for a formula is put behind an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
