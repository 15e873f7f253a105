"""docs/sequence.md: its table is that of the numbers kept, and tells of every mixer what it says of itself."""

import importlib
import json

import pytest

from attention.mixer import MIXERS, build
from tests.documents import ROOT


def test_the_table_of_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    traffic = importlib.import_module("traffic")
    rows = json.loads(traffic.RESULTS.read_text())["rows"]
    assert traffic.documented(rows) in traffic.PAGE.read_text(), "run python benchmarks/traffic.py --docs"
    assert len(rows) == len(traffic.subjects())
    for row, (kind, settings) in zip(rows, traffic.subjects(), strict=True):
        assert row["what crosses"] == build(kind, 48, **settings).sequence_parallel, "measure again"
    assert {kind for kind, _ in traffic.subjects()} == set(MIXERS)
