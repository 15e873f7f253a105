"""What tables made from a sweep share: which sweep, and results and a figure kept under one name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from report import publish_all

from lmtrain.report.chart import Chart
from lmtrain.report.svg import draw
from lmtrain.sweep.comparison import Collected
from lmtrain.sweep.seeds import Variants

ROOT = Path(__file__).parent.parent


def command_line(usage: str, name: str) -> argparse.ArgumentParser:
    """The folder, and the name of what is kept."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the folder of a sweep with its results")
    parser.add_argument("--name", default=name, help=f"of both files ({name})")
    return parser


def keep(name: str, collected: Collected, tables: dict[str, list[dict[str, Any]]], chart: Chart) -> None:
    """Print the tables; write them and their runs to benchmarks/results/NAME.json, the chart to docs/NAME.svg."""
    results = ROOT / "benchmarks/results" / f"{name}.json"
    publish_all(tables, str(results))
    kept = json.loads(results.read_text())
    kept["sweep"] = {
        "name": collected.name,
        "at": Variants(collected).places,
        "failed": [failure.name for failure in collected.failures],
        "runs": [{"name": r.name, "seed": r.seed, collected.unit.name: collected.loss(r)} for r in collected.runs],
    }
    results.write_text(json.dumps(kept, indent=1) + "\n")
    (ROOT / "docs" / f"{name}.svg").write_text(draw(chart, alone=True) + "\n")
