"""Figures as PNG, where matplotlib is installed."""

from __future__ import annotations

import io

from lmtrain.report.chart import COLOURS, Chart
from lmtrain.report.svg import LIGHT

_MARKERS = "os^D"


def draw(chart: Chart) -> bytes | None:
    """The figure as `svg.draw` shows it in light; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7.5, 0.28 * len(chart.rows) + 1.2 if chart.rows else 4.2), layout="constrained")
    axes = figure.subplots()
    for series in chart.series:
        colour, marker = LIGHT[series.colour % COLOURS], _MARKERS[(series.colour + series.colour // COLOURS) % 4]
        style = ("--" if series.dashed else "-") if series.line else "none"
        x, y = [p.x for p in series.points], [p.y for p in series.points]
        mark = marker if series.marks else ""
        axes.plot(x, y, linestyle=style, marker=mark, markersize=5, color=colour, label=_plain(series.label) or "_")
        for x0, y0, x1, y1 in series.whiskers:
            axes.plot([x0, x1], [y0, y1], color=colour)
        if series.band:
            x_band, low, high = zip(*series.band, strict=True)
            axes.fill_between(x_band, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    for number, axis in enumerate((axes.xaxis, axes.yaxis)):
        values, names = zip(*chart.ticks(number), strict=True)
        axis.set_ticks(values, [_plain(name) for name in names])
    axes.minorticks_off()
    axes.set(xlabel=_plain(chart.x_label), ylabel=_plain(chart.y_label), xlim=chart.range(0))
    axes.set_ylim(*(reversed(chart.range(1)) if chart.rows else chart.range(1)))
    axes.set_title(_plain(chart.title), fontsize="medium")
    if any(series.label for series in chart.series):
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _plain(text: str) -> str:
    """Dollars would begin a formula; an underscore in front would hide a label."""
    return text.replace("$", r"\$").lstrip("_")
