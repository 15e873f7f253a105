"""Draw the figure of the README from committed numbers: step time against sequence length.

python benchmarks/plot.py        reads benchmarks/results/growth.json, writes docs/growth.svg
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Write docs/growth.svg."""
    rows = json.loads((ROOT / "benchmarks/results/growth.json").read_text())["rows"]
    plt.rcParams.update({"svg.hashsalt": "lmtrain", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for row in rows:
        points = {int(key.removeprefix("T=")): seconds for key, seconds in row.items() if key.startswith("T=")}
        axes.plot(list(points), list(points.values()), marker="o", label=row["pattern"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(points), [f"{length // 1024}k" for length in points])
    axes.set(xlabel="sequence length, bytes", ylabel="seconds per step", ylim=(0, None))
    axes.set_title("Step time at 16,384 bytes per step, 2 CPU cores", fontsize="medium")
    axes.legend(frameon=False)
    figure.savefig(ROOT / "docs/growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
