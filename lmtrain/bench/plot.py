"""The curves as a picture: time of forward and backward against length, both on logarithmic axes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from lmtrain.bench.results import Results
from lmtrain.bench.subjects import PARTS, Part
from lmtrain.picture import draw_figure

TITLES: dict[Part, str] = {"mixer": "Whole mixers", "attention": "Attention alone"}


def draw(results: Results, path: Path) -> None:
    """Write the figure as SVG: medians as lines, least to greatest as bands, baselines dashed.

    `results` has rows. Raises ImportError without matplotlib.
    """
    import matplotlib

    parts = [part for part in PARTS if results.names(part)]
    names = dict.fromkeys(name for part in parts for name in results.names(part))
    twenty = [matplotlib.colormaps["tab20"](index) for index in (*range(0, 20, 2), *range(1, 20, 2))]
    colours = dict(zip(names, itertools.cycle(twenty)))

    def fill(figure: Any) -> None:
        for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            _draw_part(axes, results, part, colours)

    draw_figure(path, (6 * len(parts), 4.2), fill)


def _draw_part(axes: Any, results: Results, part: Part, colours: dict[str, Any]) -> None:
    from matplotlib.ticker import LogFormatter

    for name in results.names(part):
        rows = results.of(name, part)
        lengths = sorted(rows)
        timings = [rows[length].both for length in lengths]
        style = "--" if rows[lengths[0]].baseline is None else "-"
        colour = colours[name]
        medians = [1e3 * t.median for t in timings]
        axes.plot(lengths, medians, style, marker="o", markersize=3, color=colour, label=name)
        bands = ([1e3 * t.least for t in timings], [1e3 * t.most for t in timings])
        axes.fill_between(lengths, *bands, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(results.lengths, [f"{length:,}" for length in results.lengths])
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # plain numbers, and not too many of them
    axes.set(title=TITLES[part], xlabel="sequence length, tokens", ylabel="forward + backward, ms")
    axes.legend(frameon=False, fontsize="small")
