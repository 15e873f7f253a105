"""Whatever a sweep's folder holds, it is a result or it is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from lmtrain.sweep.comparison import read_sweep
from lmtrain.sweep.result import RunFailure, RunResult
from tests.lmtrain.sweep.made import a_failure, a_run
from tests.mutations import fuzz, mutated, refusal


@pytest.mark.fault(16)
@fuzz(st.one_of(mutated(a_run().to_json()), mutated(a_failure().to_json())), 200, 10_000)
def test_any_result(content: Any, folder: Path) -> None:
    for kind in (RunResult, RunFailure):
        (folder / kind.FILE).write_text(json.dumps(content))
        said = refusal(lambda kind=kind: kind.read(folder))
        assert said is None or said.startswith(f"{folder / kind.FILE}: ")


@pytest.mark.fault(16)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@fuzz(mutated(a_run().to_json()), 100, 10_000)
def test_any_sweep(content: Any, folder: Path) -> None:
    """Beside an intact run."""
    for name, result in {"intact": a_run(name="other").to_json(), "forged": content}.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / RunResult.FILE).write_text(json.dumps(result))
    refusal(lambda: read_sweep(folder))
