"""The results for machines: JSON and CSV, and their files."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

from lmtrain.bench.curves import Crossover, growth
from lmtrain.bench.measure import Timing, environment
from lmtrain.bench.order import CSV, JSON, Order
from lmtrain.bench.results import Comparison, Pass, Results, Row, seconds
from lmtrain.bench.text import format_results
from lmtrain.bench.tiles import TILE, Waste
from lmtrain.bench.verdict import verdicts
from lmtrain.files import replace_bytes

FIELDS: dict[str, Pass] = {"forward": "forward", "forward_backward": "both"}


@dataclass(frozen=True)
class Report:
    """What was asked for, and what was found so far."""

    order: Order
    results: Results
    tiles: list[Waste]

    def to_json(self) -> dict[str, Any]:
        """Times in milliseconds, memory in bytes; pairs of one sequence, over all query heads."""
        comparisons = self.results.comparisons()
        return {
            "environment": environment(),
            "protocol": self.order.protocol(),
            "rows": [self._row(row) for row in self.results.rows],
            "skipped": [vars(skip) for skip in self.results.skipped],
            "comparisons": [_comparison(c) for c in comparisons],
            "verdicts": verdicts(comparisons),
            "tiles": {"size": TILE, "patterns": [vars(waste) for waste in self.tiles]},
        }

    def to_csv(self) -> str:
        """The rows, a line each."""
        rows = [_flat(self._row(row)) for row in self.results.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def format(self) -> str:
        """For people."""
        return format_results(self.order, self.results, self.tiles)

    def write(self) -> None:
        """Put JSON and CSV into the folder of the order, instead of what an earlier length left there."""
        self.order.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        replace_bytes(self.order.out / JSON, text.encode())
        replace_bytes(self.order.out / CSV, self.to_csv().encode())

    def _row(self, row: Row) -> dict[str, Any]:
        c = self.results.comparison(row.name, row.part)
        beside = c if c is not None and row.length in c.lengths else None
        return {
            "name": row.name,
            "part": row.part,
            "baseline": row.baseline,
            "length": row.length,
            "forward_ms": _milliseconds(row.forward),
            "forward_backward_ms": _milliseconds(row.both),
            "peak_bytes": row.peak_bytes,
            "pairs": row.pairs,
            "speed_up_forward": beside and beside.speed_up(row.length, "forward"),
            "speed_up": beside and beside.speed_up(row.length, "both"),
            "bound": beside and beside.bound(row.length),
            "block_mask_ms": None if row.block_mask_seconds is None else 1e3 * row.block_mask_seconds,
        }


def _milliseconds(timing: Timing) -> dict[str, float]:
    return {name: 1e3 * value for name, value in vars(timing).items()}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """`{a: {b: 1}}` as `{a_b: 1}`; the median of a timing keeps its name alone."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {key if name == "median" else f"{key}_{name}": number for name, number in value.items()}
        else:
            flat[key] = value
    return flat


def _comparison(c: Comparison) -> dict[str, Any]:
    return {
        "name": c.name,
        "part": c.part,
        "baseline": c.baseline,
        "growth": {name: growth(seconds(c.rows, which)) for name, which in FIELDS.items()},
        "baseline_growth": {name: growth(seconds(c.base, which)) for name, which in FIELDS.items()},
        "faster_from": {name: _crossover(c.crossover(which)) for name, which in FIELDS.items()},
        "loses_at": {name: c.loses(which) for name, which in FIELDS.items()},
        "too_close_at": {name: [n for n in c.lengths if c.close(n, which)] for name, which in FIELDS.items()},
    }


def _crossover(found: Crossover | None) -> dict[str, Any] | None:
    return None if found is None else {"measured": found.first, "interpolated": found.crossing}
