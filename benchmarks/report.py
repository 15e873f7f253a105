"""What every benchmark shares: the command, medians of alternated repeats, tables, JSON with the environment in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmtrain.bench.measure import Name, environment, timed_in_turn
from lmtrain.hardware import pick_device


def alternated(runs: Mapping[Name, Callable[[], Any]], repeats: int) -> dict[Name, float]:
    """Median seconds of each run; one warm-up each, then in turn."""
    pick_device()  # memory is kept as in training
    for run in runs.values():
        run()
    return {name: timing.median for name, timing in timed_in_turn(runs, repeats).items()}


def lmtrain(*words: str, **how: Any) -> str:
    """What the command prints on stdout; its mistakes are ours. how: as of `subprocess.run`."""
    command = [sys.executable, "-m", "lmtrain", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **how).stdout


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines)


def publish(rows: list[dict[str, Any]], path: str | None) -> None:
    """Print the table and the environment; with a path, keep both as JSON."""
    publish_all({"rows": rows}, path)


def publish_all(tables: dict[str, list[dict[str, Any]]], path: str | None) -> None:
    """As `publish`, for tables of rows that are not alike; each is kept under its name."""
    print("\n\n".join(map(table, tables.values())))
    print("; ".join(f"{key} {value}" for key, value in environment().items()))
    if path:
        Path(path).write_text(json.dumps({"environment": environment(), **tables}, indent=1) + "\n")


def publish_tables(tables: dict[str, list[dict[str, Any]]], path: str | None) -> None:
    """As `publish`, of several tables, each with its name above it."""
    for name, rows in tables.items():
        print(f"{name}\n\n{table(rows)}\n")
    print("; ".join(f"{key} {value}" for key, value in environment().items()))
    if path:
        Path(path).write_text(json.dumps({"environment": environment(), "tables": tables}, indent=1) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
