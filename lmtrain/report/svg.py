"""Figures as SVG, without any library: readable in light and dark, with texts that stay text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log

from lmtrain.report.chart import COLOURS, Chart, Series, safe

WIDTH, HEIGHT = 620, 340
TOP, RIGHT, BOTTOM, LEFT = 34, 170, 46, 62
"""Margins; the legend stands at the right."""
ROW = 22  # pixels of a named row
LETTER = 6.4  # pixels, about, of a letter of 12 pixels
LEGEND = 18  # lines of a legend, at most

LIGHT = (
    *("#0072b2", "#d55e00", "#008060", "#b8478c", "#8a6d00", "#3b8fc4"),
    *("#5b4db3", "#a83232", "#4d7a1f", "#6b6b6b", "#a0522d", "#117a8b"),
)
_DARK = (
    *("#56b4e9", "#ff8c42", "#2ec99a", "#ea8fc4", "#e6c229", "#8fd0ff"),
    *("#a99cf5", "#ff7b7b", "#9fd356", "#b5b5b5", "#e0a070", "#4fd1e0"),
)


def style() -> str:
    """CSS of all figures, once in a page or in each file: colours in both schemes."""
    plain = ("#1d2127", "#ffffff", "#d9dde3")
    dark = ("#e4e7eb", "#14171b", "#343a42")
    rules = [
        f":root{{color-scheme:light dark;{_variables(plain, LIGHT)}}}",
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(dark, _DARK)}}}}}",
        "svg.chart{font:12px system-ui,sans-serif;max-width:100%;height:auto;background:var(--paper)}",
        ".chart text{fill:var(--ink)}.chart .title{font-weight:600;font-size:13px}",
        ".chart .grid{stroke:var(--rule);fill:none}",
        ".chart .line{fill:none;stroke-width:1.8}.chart .dashed{stroke-dasharray:5 4}",
        ".chart .whisker{stroke-width:1.4}.chart .band{opacity:.16;stroke:none}",
    ]
    rules += [f".chart .c{n}{{stroke:var(--c{n})}}.chart .f{n}{{fill:var(--c{n})}}" for n in range(COLOURS)]
    return "\n".join(rules)


def _variables(plain: tuple[str, str, str], colours: tuple[str, ...]) -> str:
    named = dict(zip(("ink", "paper", "rule"), plain, strict=True)) | {f"c{n}": c for n, c in enumerate(colours)}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


def draw(chart: Chart, *, alone: bool) -> str:
    """The figure as an <svg>; alone: with its style, as a file. It has something to draw."""
    plot = _Plot(chart)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {WIDTH} {plot.height}" '
        f'width="{WIDTH}" height="{plot.height}" aria-label="{safe(chart.title)}">',
        f"<style>{style()}</style>" if alone else "",
        f'<text class="title" x="10" y="18">{safe(chart.title)}</text>',
        *plot.axes(),
        *(part for series in chart.series for part in plot.series(series)),
        *plot.legend(),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


class _Plot:
    """Where things stand: data to pixels."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.height = TOP + BOTTOM + ROW * len(chart.rows) if chart.rows else HEIGHT
        self.left = LEFT if not chart.rows else min(240, 16 + LETTER * max(map(len, chart.rows)))
        self.right = WIDTH - (RIGHT if any(series.label for series in chart.series) else 20)
        self.bottom = self.height - BOTTOM
        self.x = _scale(chart.range(0), (self.left, self.right), chart.log_x)
        ends = (TOP, self.bottom) if chart.rows else (self.bottom, TOP)
        self.y = _scale(chart.range(1), ends, chart.log_y)

    def axes(self) -> Iterator[str]:
        chart = self.chart
        width, height = self.right - self.left, self.bottom - TOP
        yield f'<rect class="grid" x="{self.left:.1f}" y="{TOP}" width="{width:.1f}" height="{height:.1f}"/>'
        for value, name in chart.ticks(0):
            x = self.x(value)
            yield f'<path class="grid" d="M{x:.1f} {TOP}V{self.bottom}"/>'
            yield f'<text x="{x:.1f}" y="{self.bottom + 16}" text-anchor="middle">{name}</text>'
        for value, name in chart.ticks(1):
            y = self.y(value)
            yield f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right}"/>'
            yield f'<text x="{self.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{safe(_cut(name, 34))}</text>'
        middle = (self.left + self.right) / 2
        yield f'<text x="{middle:.1f}" y="{self.height - 10}" text-anchor="middle">{safe(chart.x_label)}</text>'
        if chart.y_label:
            turned = f'transform="translate(14 {(TOP + self.bottom) / 2:.1f}) rotate(-90)"'
            yield f'<text {turned} text-anchor="middle">{safe(chart.y_label)}</text>'

    def series(self, series: Series) -> Iterator[str]:
        colour = series.colour % COLOURS
        if series.band:
            edge = [(x, high) for x, _, high in series.band] + [(x, low) for x, low, _ in reversed(series.band)]
            yield f'<path class="band f{colour}" d="{self._path(edge)}Z"/>'
        for x0, y0, x1, y1 in series.whiskers:
            yield f'<path class="whisker c{colour}" d="{self._path([(x0, y0), (x1, y1)])}"/>'
        if series.line:
            dashed = " dashed" if series.dashed else ""
            yield f'<path class="line c{colour}{dashed}" d="{self._path([(p.x, p.y) for p in series.points])}"/>'
        if series.marks:
            for p in series.points:
                text = f"<title>{safe(p.text)}</title>" if p.text else ""
                yield f'<g class="f{colour}">{_mark(series.colour, self.x(p.x), self.y(p.y))}{text}</g>'

    def legend(self) -> Iterator[str]:
        named = [series for series in self.chart.series if series.label]
        for number, series in enumerate(named[:LEGEND]):
            x, y, colour = self.right + 14, TOP + 8 + 16 * number, series.colour % COLOURS
            if series.line:
                dashed = " dashed" if series.dashed else ""
                yield f'<path class="line c{colour}{dashed}" d="M{x - 7} {y}h14"/>'
            if series.marks:
                yield f'<g class="f{colour}">{_mark(series.colour, x, y)}</g>'
            yield f'<text x="{x + 12}" y="{y + 4}">{safe(_cut(series.label, 21))}</text>'
        if len(named) > LEGEND:
            yield f'<text x="{self.right + 26}" y="{TOP + 12 + 16 * LEGEND}">and {len(named) - LEGEND} more</text>'

    def _path(self, points: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def _scale(values: tuple[float, float], pixels: tuple[float, float], logarithmic: bool) -> Callable[[float], float]:
    low, high = (log(v) for v in values) if logarithmic else values
    slope = (pixels[1] - pixels[0]) / (high - low)
    return lambda value: pixels[0] + slope * ((log(value) if logarithmic else value) - low)


def _mark(number: int, x: float, y: float) -> str:
    """A disc, square, triangle or diamond, so that colour is not all that tells series apart."""
    shape = (number + number // COLOURS) % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    corners = {1: "-3.5 -3.5h7v7h-7z", 2: "0 -4.8l4.6 8h-9.2z", 3: "0 -5l5 5l-5 5l-5 -5z"}[shape]
    return f'<path transform="translate({x:.1f} {y:.1f})" d="M{corners}"/>'


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
