"""The curves as a picture: time of forward and backward against length, both on logarithmic axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmtrain.bench.results import Results
from lmtrain.bench.subjects import PARTS, Part

TITLES: dict[Part, str] = {"mixer": "Whole mixers", "attention": "Attention alone"}


def draw(results: Results, path: Path) -> None:
    """Write the figure as SVG: medians as lines, least to greatest as bands, baselines dashed.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    parts = [part for part in PARTS if results.names(part)]
    with plt.rc_context({"svg.hashsalt": "lmtrain", "svg.fonttype": "none"}):
        figure, all_axes = plt.subplots(
            1, max(1, len(parts)), figsize=(6 * max(1, len(parts)), 4.2), layout="constrained", squeeze=False
        )
        for axes, part in zip(all_axes[0], parts, strict=False):
            _draw_part(axes, results, part)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def _draw_part(axes: Any, results: Results, part: Part) -> None:
    for name in results.names(part):
        rows = results.of(name, part)
        lengths = sorted(rows)
        timings = [rows[length].both for length in lengths]
        style = "--" if rows[lengths[0]].baseline is None else "-"
        (line,) = axes.plot(lengths, [1e3 * t.median for t in timings], style, marker="o", markersize=3, label=name)
        bands = ([1e3 * t.least for t in timings], [1e3 * t.most for t in timings])
        axes.fill_between(lengths, *bands, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(results.lengths, [f"{length:,}" for length in results.lengths])
    axes.set(title=TITLES[part], xlabel="sequence length, tokens", ylabel="forward + backward, ms")
    axes.legend(frameon=False, fontsize="small")
