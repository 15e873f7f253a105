"""Tables of the documents that come from results say what the results say."""

from pathlib import Path
from types import ModuleType

import pytest

from tests.documents import ROOT


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fill

    return fill


def test_every_page_has_the_rows_of_its_results(fill: ModuleType) -> None:
    for path in fill.pages():
        page = path.read_text()
        assert fill.filled(page) == page, f"{path.name}: run python benchmarks/fill.py"


def test_a_marked_table_is_replaced_and_nothing_else(
    fill: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/x.json").write_text(
        '{"rows": [{"a": 1, "b": "c"}, {"a": 2, "b": "d"}], "laws": [{"E": 0}]}'
    )
    begin, end = "<!-- rows of benchmarks/results/x.json -->\n", "<!-- end of rows -->"
    laws = begin.replace("rows", "laws")
    page = fill.filled(f"before\n{begin}old\n{end}\nafter\n{begin}{end}\n{laws}<!-- end of laws -->")
    table = "| a | b |\n| --- | --- |\n| 1 | c |\n| 2 | d |\n"
    assert (
        page
        == f"before\n{begin}{table}{end}\nafter\n{begin}{table}{end}\n{laws}| E |\n| --- |\n| 0 |\n<!-- end of laws -->"
    )
