"""`lmtrain report RUN...`, `lmtrain sweep fit | report FOLDER`: arguments, and a function for each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from launch.show import show


def add_report(sub: argparse.ArgumentParser) -> None:
    """Arguments of the verb `report`."""
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folders of finished runs, scored alike")
    sub.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="for the page (report)")


def add_actions(actions: Any) -> None:
    """The actions of `sweep` that only read what its runs have left behind."""
    what = "the folder of a sweep, with finished runs in it"
    fitting = actions.add_parser("fit", help="the laws of its runs, with intervals", description="Fit scaling laws.")
    fitting.add_argument("folder", type=Path, metavar="FOLDER", help=what)
    fitting.add_argument("--json", action="store_true", help="one JSON object on stdout")
    fitting.set_defaults(run=_fit)
    reporting = actions.add_parser("report", help="one page about its runs", description="Write one HTML page.")
    reporting.add_argument("folder", type=Path, metavar="FOLDER", help=what)
    reporting.add_argument("--out", type=Path, metavar="FOLDER", help="for the page (report/ in the sweep's folder)")
    reporting.set_defaults(run=_report_sweep)


def report(arguments: argparse.Namespace) -> int:
    """Compare single runs."""
    from lmtrain.report.single import read_runs

    return _write(read_runs(arguments.runs), arguments.out)


def _report_sweep(arguments: argparse.Namespace) -> int:
    from lmtrain.sweep.comparison import read_sweep

    return _write(read_sweep(arguments.folder), arguments.out or arguments.folder / "report")


def _write(collected: Any, folder: Path) -> int:
    from lmtrain.report.write import write_report

    page, missing = write_report(collected, folder)
    print(f"{page}: its figures (SVG, PNG), runs.csv and fit.json lie beside it")
    for line in missing:
        print(line, file=sys.stderr)
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    from lmtrain.sweep.comparison import read_sweep
    from lmtrain.sweep.fit import fit_sweep

    fits = fit_sweep(read_sweep(arguments.folder))
    show(arguments, fits.to_json, fits.format)
    print(f"kept in {fits.write(arguments.folder)}", file=sys.stderr)
    return 0
