"""One report for all tests of it: made once, of results with hostile names."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.cli import main
from tests.lmtrain.sweep.made import a_failure, a_grid, written

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with its report: two mixers, three seeds, one law, sparsity, a failure, hostile names."""
    runs = a_grid(sizes=(10**6, 2 * 10**6, 4 * 10**6, 8 * 10**6), tokens=(10**8, 2 * 10**8, 4 * 10**8, 8 * 10**8))
    runs += a_grid(mixers=(EVIL,), sizes=(10**6,), tokens=(10**8,), sparsities=(2.0, 8.0), seeds=(1, 2, 3))
    runs = [replace(run, command=f"train {EVIL}", environment={"gpu": EVIL}) for run in runs]
    failure = a_failure(name=EVIL, reason=f"out of memory {EVIL}")
    path = written(tmp_path_factory.mktemp("report") / "a<b>&c", runs, [failure])
    assert main(["sweep", "report", str(path)]) == 0
    return path / "report"
