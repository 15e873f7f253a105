"""docs/recall.md and README.md: what they say of recall is what was measured, and their definitions' settings exist."""

import dataclasses
import importlib
import re
from types import ModuleType

import pytest

from attention.mixer import MIXERS
from data.tasks import TASKS
from lmtrain.config import load
from tests.documents import ROOT

PAGE = (ROOT / "docs/recall.md").read_text()


@pytest.fixture
def recall(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("recall")


def test_tables_and_paragraph_are_those_of_the_results(recall: ModuleType) -> None:
    rows = recall.read_results()
    tables = recall.tables(rows)
    assert tables
    for task, text in tables.items():
        assert f"<!-- table of {task} -->\n{text}\n<!-- end" in PAGE, "run python benchmarks/recall.py --report"
    assert f"<!-- recall -->\n{recall.sentence(rows)}\n<!-- end" in (ROOT / "README.md").read_text()


def test_results_are_of_the_configurations_that_are_shipped(recall: ModuleType) -> None:
    for row in recall.read_results():
        config = load(
            f"recall/{row['task']}", [f"model.mixers.it={recall.MIXERS[row['mixer']]}", *recall.SHORTER[row["task"]]]
        )
        assert row["settings"] == recall.MIXERS[row["mixer"]], "measure again"
        assert row["steps"] == config.train.steps
        if row["grid"] is None:
            assert row["corpus"] == config.task.title(config.data.seq_len)


def test_every_mixer_is_asked(recall: ModuleType) -> None:
    assert set(recall.MIXERS) == set(MIXERS)


def test_every_task_and_its_settings_are_defined() -> None:
    for name, task in TASKS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*", PAGE, re.M)
        known = {"vocab_size": "V", "pairs": "k", "symbols": "n"}
        for field in dataclasses.fields(task):
            assert known.get(field.name, field.name) in row


def test_a_page_without_its_mark_is_left_alone(recall: ModuleType, tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- end of x -->\nbehind\n")
    recall.put(page, "x", "new")
    assert page.read_text() == "before\n<!-- x -->\nnew\n<!-- end of x -->\nbehind\n"
    with pytest.raises(AssertionError):
        recall.put(page, "y", "new")
    assert "new" in page.read_text()
