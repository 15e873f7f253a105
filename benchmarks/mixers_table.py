"""From the folder of a finished sweep to the README's table and plot of mixers.

    python benchmarks/mixers_table.py runs/enwik8-mixers [--name mixers] && python benchmarks/fill.py

Writes benchmarks/results/NAME.json, whose rows the second command puts into the pages, and docs/NAME.svg. A row for
each mixer, best first: the mean over seeds and half the width of its 95 % interval (Student's t). Only a sweep with one
size and one number of tokens is one table.

Runs of a sweep share the machine, with each other and with whatever else ran in these hours: for the column of speeds
each mixer trains a few steps again, alone, one mixer after the other, in several rounds.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from report import lmtrain
from sweep_results import command_line, keep

from lmtrain.report.figures import STATE_LENGTH, state_bytes, variants_chart
from lmtrain.run import read_metrics
from lmtrain.sweep.comparison import Collected, read_sweep
from lmtrain.sweep.seeds import Cell, Variants

STEPS, WARM_UP = 12, 4


def speeds(sweep: Path, variants: Variants, rounds: int) -> dict[str, float]:
    """Variant -> tokens per second of training with one thread: the median over the steps of all rounds."""
    folders = {cell.variant: next(sweep.glob(f"*-{cell.runs[0].hash}")) for cell in variants.cells}
    seen: dict[str, list[float]] = {variant: [] for variant in folders}
    for _ in range(rounds):
        for variant, folder in folders.items():
            seen[variant] += _pace(folder / "config.yaml")
    return {variant: median(values) for variant, values in seen.items()}


def _pace(config: Path) -> list[float]:
    """Tokens per second in each of a few steps."""
    with TemporaryDirectory() as folder:
        words = [f"train.steps={STEPS}", "train.threads=1", "log.every=1", "eval.tokens=1024", f"run.dir={folder}/run"]
        lmtrain("train", str(config), *words, stderr=subprocess.DEVNULL)
        rows = read_metrics(Path(folder) / "run")
    return [row["tokens_per_second"] for row in rows if "split" not in row and row["step"] > WARM_UP]


def rows_of(collected: Collected, variants: Variants, paces: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each variant, least loss first. ValueError if they were not run at one place."""
    if len(variants.places) > 1:
        raise ValueError(f"{collected.name}: one table for {' and '.join(variants.places)}? use lmtrain sweep report")
    ranked = sorted(variants.cells, key=lambda cell: cell.mean(collected.loss).value)
    return [_row(collected, cell, paces[cell.variant]) for cell in ranked]


def _row(collected: Collected, cell: Cell, pace: float) -> dict[str, Any]:
    loss, first = cell.mean(collected.loss), cell.runs[0]
    return {
        "mixer": f"`{cell.variant}`",
        collected.unit.name: f"{loss.value:.3f}" + ("" if loss.half is None else f" ± {loss.half:.3f}"),
        "seeds": loss.count,
        "million parameters": round(first.parameters_total / 1e6, 2),
        "MFLOPs per token": round(first.flops_per_token / 1e6, 2),
        "tokens/s": f"{pace:,.0f}",
        f"state at {STATE_LENGTH // 1024}k, bytes": f"{state_bytes(first):,.0f}",
        "strict": "yes" if first.strict else "no",
    }


def main() -> None:
    """Write JSON and SVG, print the table."""
    parser = command_line(__doc__, "mixers")
    parser.add_argument("--rounds", type=int, default=3, help="of training steps for the column of speeds (3)")
    arguments = parser.parse_args()
    collected = read_sweep(arguments.sweep)
    variants = Variants(collected)
    paces = speeds(arguments.sweep, variants, arguments.rounds)
    keep(arguments.name, collected, {"rows": rows_of(collected, variants, paces)}, variants_chart(collected, variants))


if __name__ == "__main__":
    main()
