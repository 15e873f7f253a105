"""From the folder of a finished sweep to the README's table and plot of mixers.

    python benchmarks/mixers_table.py runs/enwik8-mixers [--name mixers] && python benchmarks/fill.py

Writes benchmarks/results/NAME.json, whose rows the second command puts into the pages, and docs/NAME.svg. A row for
each mixer, best first: the mean over seeds and half the width of its 95 % interval (Student's t). Only a sweep with one
size and one number of tokens is one table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from report import publish_all

from lmtrain.report.figures import STATE_LENGTH, state_bytes, variants_chart
from lmtrain.report.svg import draw
from lmtrain.sweep.comparison import Collected, read_sweep
from lmtrain.sweep.seeds import Cell, Variants

ROOT = Path(__file__).parent.parent


def rows_of(collected: Collected, variants: Variants) -> list[dict[str, Any]]:
    """A row for each variant, least loss first. ValueError if they were not run at one place."""
    if len(variants.places) > 1:
        raise ValueError(f"{collected.name}: one table for {' and '.join(variants.places)}? use lmtrain sweep report")
    ranked = sorted(variants.cells, key=lambda cell: cell.mean(collected.loss).value)
    return [_row(collected, cell) for cell in ranked]


def _row(collected: Collected, cell: Cell) -> dict[str, Any]:
    loss, first = cell.mean(collected.loss), cell.runs[0]
    return {
        "mixer": f"`{cell.variant}`",
        collected.unit.name: f"{loss.value:.3f}" + ("" if loss.half is None else f" ± {loss.half:.3f}"),
        "seeds": loss.count,
        "million parameters": round(first.parameters_total / 1e6, 2),
        "MFLOPs per token": round(first.flops_per_token / 1e6, 2),
        "tokens/s": f"{cell.mean(lambda run: run.tokens_per_second).value:,.0f}",
        f"state at {STATE_LENGTH // 1024}k, bytes": f"{state_bytes(first):,.0f}",
        "strict": "yes" if first.strict else "no",
    }


def main() -> None:
    """Write JSON and SVG, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the folder of a sweep with its results")
    parser.add_argument("--name", default="mixers", help="of both files (mixers)")
    arguments = parser.parse_args()
    collected = read_sweep(arguments.sweep)
    variants = Variants(collected)
    results = ROOT / "benchmarks/results" / f"{arguments.name}.json"
    publish_all({"rows": rows_of(collected, variants)}, str(results))
    kept = json.loads(results.read_text())
    kept["sweep"] = {
        "name": collected.name,
        "at": variants.places,
        "failed": [failure.name for failure in collected.failures],
        "runs": [{"name": r.name, "seed": r.seed, collected.unit.name: collected.loss(r)} for r in collected.runs],
    }
    results.write_text(json.dumps(kept, indent=1) + "\n")
    (ROOT / "docs" / f"{arguments.name}.svg").write_text(draw(variants_chart(collected, variants), alone=True) + "\n")


if __name__ == "__main__":
    main()
