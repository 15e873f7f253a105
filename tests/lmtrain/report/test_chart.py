"""Figures: ticks are round, marks stand where the numbers say, texts cannot break out."""

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from lmtrain.report import png
from lmtrain.report.chart import Chart, Point, Series, apart, short, ticks
from lmtrain.report.svg import draw

SVG = "{http://www.w3.org/2000/svg}"


def chart(*series: Series, **changes: object) -> Chart:
    return Chart(**{"name": "x", "title": "t", "x_label": "x", "y_label": "y", "series": series, **changes})


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0.0, 1.0, False), (2.31, 2.34, False), (-5.0, 9e6, False), (1.0, 9.0, True), (1e3, 1e12, True), (1.9, 2.1, True)],
)
def test_ticks_are_few_round_and_inside(low: float, high: float, log: bool) -> None:
    found = ticks(low, high, log)
    assert 2 <= len(found) <= 11
    assert found == sorted(found)
    assert all(low <= tick <= high for tick in found)
    assert all(len(f"{tick:.9e}".partition("e")[0].replace(".", "").strip("0-")) <= 3 for tick in found)


def test_ticks_of_values_that_were_tried_are_those_and_the_same_in_svg_and_png(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [2.0, 8.0, 32.0, 64.0]
    drawing = chart(Series("a", 0, [Point(rho, 100 * rho) for rho in tried]), log_x=True, log_y=True, x_ticks=tried)
    assert drawing.ticks(0) == [(2, "2"), (8, "8"), (32, "32"), (64, "64")]
    drawn = ElementTree.fromstring(draw(drawing, alone=True))
    texts = [node.text for node in drawn.iter(f"{SVG}text")]
    names = [name for axis in (0, 1) for _, name in drawing.ticks(axis)]
    assert [text for text in texts if text in names] == names
    figures = pytest.importorskip("matplotlib.figure", reason="PNG needs matplotlib, which is not installed")
    made: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: made.append(self))
    png.draw(drawing)
    (axes,) = made[0].axes
    for axis, number in ((axes.xaxis, 0), (axes.yaxis, 1)):
        assert [text.get_text() for text in axis.get_ticklabels()] == [name for _, name in drawing.ticks(number)]
        assert list(axis.get_minorticklocs()) == []


def test_values_too_near_for_their_texts_are_left_out() -> None:
    assert apart([1, 2, 3, 100], 0, 100, log=False) == [1, 100]
    assert apart([1, 2, 3, 100], 1, 100, log=True) == [1, 2, 3, 100]  # a twelfth of ln 100 is 0.38, ln 3/2 is 0.41


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (2.5, "2.5"), (1000, "1k"), (65536, "65.54k"), (3e9, "3G"), (1e19, "10E")]
)
def test_ticks_in_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize("log", [False, True])
def test_marks_stand_in_the_order_and_proportion_of_their_numbers(log: bool) -> None:
    values = [1.0, 10.0, 100.0] if log else [1.0, 2.0, 3.0]
    points = [Point(value, value) for value in values]
    drawn = ElementTree.fromstring(draw(chart(Series("a", 0, points), log_x=log, log_y=log), alone=True))
    circles = [c for c in drawn.iter(f"{SVG}circle")][:3]
    x, y = ([float(c.get(name, "")) for c in circles] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert x[1] > x[0]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert y[1] < y[0]


def test_a_single_point_and_named_rows_can_be_drawn() -> None:
    text = draw(chart(Series("", 3, [Point(2.0, 0)]), rows=["mosa"]), alone=True)
    assert "mosa" in text
    assert "nan" not in text


def test_texts_stay_texts() -> None:
    bad = "<script>alert(1)</script>\x00\"'&"
    text = draw(chart(Series(bad, 0, [Point(1, 1, bad)]), title=bad, x_label=bad, y_label=bad, rows=[bad]), alone=True)
    root = ElementTree.fromstring(text)  # well-formed, so nothing broke out
    assert {node.tag for node in root.iter()} <= {
        f"{SVG}{t}" for t in ("svg", "style", "text", "path", "rect", "g", "circle", "title")
    }
    assert not re.search(r"<script", text)


def test_both_colour_schemes_are_in_every_file() -> None:
    assert "prefers-color-scheme:dark" in draw(chart(Series("a", 0, [Point(1, 1)])), alone=True)


def test_png_is_one_where_matplotlib_is() -> None:
    pytest.importorskip("matplotlib", reason="PNG needs matplotlib, which is not installed")
    series = Series("$x_1$ _a", 0, [Point(1, 1), Point(2, 3)], line=True, band=[(1, 0, 2), (2, 2, 4)])
    picture = png.draw(chart(series, log_x=True))
    assert picture is not None
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
