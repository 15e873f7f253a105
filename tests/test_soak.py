"""benchmarks/soak.py: the same command survives its faults, and what it is there to find it finds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.documents import ROOT


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; in what it starts Python finds this checkout."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return importlib.import_module("soak")


@pytest.mark.fault(1, 3, 4, 5)
def test_some_faults_and_the_same_bits(soak: Any, tmp_path: Path) -> None:
    faults = importlib.import_module("soak_faults")
    disturbed = soak.Soak(tmp_path, Random(6))  # it is killed in its third save
    try:
        for fault in (faults.killed_in_a_save, faults.leftovers, faults.a_flipped_bit, faults.a_torn_row):
            assert fault(disturbed) is not False, "it could not happen"
            disturbed.check()
        steps = soak.stop_at_last(disturbed)
        other = soak.undisturbed(disturbed, steps)
    finally:
        disturbed.close()
    soak.compare(disturbed.run, other, steps)
    events = [json.loads(line)["event"] for line in (disturbed.run / "events.jsonl").read_text().splitlines()]
    assert events.count("start") == disturbed.starts == 2
    assert "damaged" in events
    assert "cleaned" in events
    spoil(disturbed.run / "metrics.jsonl", '"loss": ', '"loss": 1')
    with pytest.raises(soak.SoakError, match=r"^row 3 is .*, undisturbed "):
        soak.compare(disturbed.run, other, steps)


def spoil(path: Path, old: str, new: str) -> None:
    """Another text in the third line."""
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[2]
    path.write_text("".join([*lines[:2], lines[2].replace(old, new), *lines[3:]]))


@pytest.mark.parametrize("steps", [[2, 3], [1, 3], [1, 2, 2, 3], [1, 2, 3, 2, 3]])
def test_a_lost_or_doubled_step_is_found(soak: Any, tmp_path: Path, steps: list[int]) -> None:
    watched = soak.Soak(tmp_path, Random(0))
    watched.run.mkdir()
    rows = [{"step": step, "loss": 1.0} for step in steps]
    (watched.run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(soak.SoakError, match="the rows do not count"):
        watched.check()


def test_a_checkpoint_that_went_away_is_found(soak: Any, tmp_path: Path) -> None:
    watched = soak.Soak(tmp_path, Random(0))
    watched.check()
    watched.newest = 5
    with pytest.raises(soak.SoakError, match="of step -1; it was of step 5"):
        watched.check()


def test_an_exit_code_that_should_not_be_is_found(soak: Any, tmp_path: Path) -> None:
    watched = soak.Soak(tmp_path, Random(0))
    with pytest.raises(soak.SoakError, match="exit code 3, expected 75 or -15"):
        watched.expect(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]), 75, -15)


@pytest.mark.slow
@pytest.mark.fault(1, 3, 4, 5, 7, 8, 12, 13)
def test_three_minutes(tmp_path: Path) -> None:
    """As a user would start it; another seed than that of the result that is kept."""
    kept = tmp_path / "soak.json"
    command = ["benchmarks/soak.py", "--minutes", "3", "--seed", "1", "--folder", str(tmp_path / "soak")]
    done = subprocess.run(
        [sys.executable, *command, "--json", str(kept)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (total,) = json.loads(kept.read_text())["total"]
    assert total["same bits"] is True
    assert total["faults"] > 10
    assert total["steps"] > 100
