"""The page: complete in itself, everything escaped, nothing of others replaced."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch.cli import main
from lmtrain.report.chart import Point
from lmtrain.report.figures import figures, front
from lmtrain.report.write import to_csv
from lmtrain.sweep.comparison import collect
from lmtrain.sweep.fit import fit_sweep
from tests.lmtrain.report.conftest import EVIL
from tests.lmtrain.sweep.made import a_grid, a_run, written


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not {"src", "href", "onload", "onerror"} & {name for name, _ in page.attributes}
    assert not any("url(" in (value or "") for _, value in page.attributes)


def test_the_page_says_all_that_it_must(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    words = ["IsoFLOP", "L = E + A N^-a + B D^-b", "N*(C) grows as", "loss against sparsity", "decode state at 65,536"]
    words += [
        "peak memory of training",
        "training time (seconds)",
        "seeds",
        "±",
        "out of memory",
        "train <script>",
        "a<b>&c",
    ]
    assert [word for word in words if word not in page.text] == []
    assert page.tags.count("svg") >= 8


def test_figures_and_tables_lie_beside_it(folder: Path) -> None:
    drawn = {path.stem for path in folder.glob("*.svg")}
    assert {"variants", "flops", "isoflop-1", "law-1", "best-size", "sparsity-0", "pareto-time"} <= drawn
    with open(folder / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 + 6
    assert {row["mixer"] for row in rows} == {"dense", EVIL}
    assert json.loads((folder / "fit.json").read_text())["unit"] == "bits per byte"


def test_a_report_is_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = str(written(tmp_path / "sweep", [a_run()]))
    for _ in range(2):
        assert main(["sweep", "report", sweep]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/runs.csv").write_text("mine")
    assert main(["sweep", "report", sweep, "--out", str(tmp_path / "mine")]) == 2
    assert "holds no report of ours" in capsys.readouterr().err
    assert (tmp_path / "mine/runs.csv").read_text() == "mine"


def test_each_mixer_has_a_figure_of_its_sparsities_with_ticks_where_it_was_run() -> None:
    runs = a_grid(mixers=("far",), sparsities=(2.0, 64.0)) + a_grid(mixers=("near",), sparsities=(2.0, 8.0, 32.0))
    drawn = {c.name: c for c in figures(fit_sweep(collect("x", runs))) if c.name.startswith("sparsity")}
    assert [chart.title.partition(":")[0] for chart in drawn.values()] == ["far", "near"]
    for name, rhos in {"sparsity-0": [2, 64], "sparsity-1": [2, 8, 32]}.items():
        assert [value for value, _ in drawn[name].ticks(0)] == rhos
        assert {tuple(p.x for p in series.points) for series in drawn[name].series} == {tuple(rhos)}
        colours = [series.colour for series in drawn[name].series]
        assert len(set(colours)) == len(colours)


def test_single_pairs_stay_in_the_json_alone(tmp_path: Path) -> None:
    """One seed, two sizes: only the two places together tell something."""
    runs = a_grid(mixers=("dense", "local"), sizes=(10**6, 10**7), tokens=(10**8,))
    assert main(["sweep", "report", str(written(tmp_path / "sweep", runs))]) == 0
    page = Page((tmp_path / "sweep/report/report.html").read_text())
    differences = json.loads((tmp_path / "sweep/report/fit.json").read_text())["differences"]
    assert [d["count"] for d in differences] == [1, 1, 2]
    assert "Left out: 2 of a single pair" in page.text
    assert page.text.count("tells nothing about chance") == 1  # in that sentence


def test_a_front_is_what_nobody_beats_in_both() -> None:
    points = [Point(x, y) for x, y in [(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (5, 2)]]
    beaten = {p for p in points for q in points if q != p and q.x <= p.x and q.y <= p.y}
    assert front(points) == [p for p in points if p not in beaten]


def test_a_cell_of_the_table_is_no_formula() -> None:
    text = to_csv(collect("x", [a_run(name="=1+1", mixer="@x")]))
    assert text.splitlines()[1].startswith("'=1+1,'@x,")
