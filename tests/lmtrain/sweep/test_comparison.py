"""What may be compared: losses in one unit, honest ones, of runs that do not contradict themselves."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lmtrain.sweep.comparison import collect, read_sweep
from tests.lmtrain.sweep.made import a_failure, a_grid, a_run, written


def test_a_folder_gives_its_runs_and_failures(tmp_path: Path) -> None:
    runs = [a_run(name="b"), a_run(name="a", seed=2)]
    collected = read_sweep(written(tmp_path / "mine", runs, [a_failure()]))
    assert [run.name for run in collected.runs] == ["a", "b"]
    assert [failure.name for failure in collected.failures] == ["broken"]
    assert collected.name == "mine"


def test_a_run_that_failed_first_and_then_finished_has_not_failed(tmp_path: Path) -> None:
    folder = written(tmp_path, [a_run(name="a")])
    a_failure(name="a").write(next(folder.iterdir()))
    assert read_sweep(folder).failures == ()


@pytest.mark.parametrize("content", [[], [a_failure()]])
def test_a_folder_without_results(tmp_path: Path, content: list) -> None:
    folder = written(tmp_path / "none", [], content)
    folder.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="no finished run in it"):
        read_sweep(folder)
    with pytest.raises(ValueError, match="no such folder"):
        read_sweep(tmp_path / "nowhere")


def test_everything_of_another_version_is_told_at_once(tmp_path: Path) -> None:
    folder = written(tmp_path, [a_run(name="a"), a_run(name="b"), a_run(name="c")])
    (folder / "sweep.json").write_text(json.dumps({"version": 99, "name": "old"}))
    for name in "ab":
        path = next(folder.glob(f"{name}-*")) / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))
    with pytest.raises(ValueError, match="of version 99") as error:
        read_sweep(folder)
    assert str(error.value).count("of version 0") == 2


def test_swapped_parameters_and_tokens_are_noticed() -> None:
    run = a_run(parameters=10**6, tokens=10**7)
    with pytest.raises(ValueError, match="parameters and tokens are swapped"):
        collect("x", [replace(run, parameters=run.tokens, tokens=run.parameters)])


def test_tokenizers_that_differ_are_compared_in_bits_per_byte_and_said() -> None:
    runs = [a_run(name="a", loss=2.0, bits_per_byte=2.0 / math.log(2)), a_run(name="b", loss=4.0, bits_per_byte=1.5)]
    collected = collect("x", runs)
    assert collected.loss(collected.runs[1]) == 1.5
    assert collected.unit.name == "bits per byte"
    assert "tokenizers differ (1.000 to 3.847 bytes per token)" in collected.unit.note


def test_nats_per_token_only_where_no_run_says_bits() -> None:
    runs = [a_run(name="a", bits_per_byte=None), a_run(name="b", bits_per_byte=None)]
    assert collect("x", runs).unit.name == "nats per token"
    with pytest.raises(ValueError, match=r"^b: no bits_per_byte, which the other runs have"):
        collect("x", [a_run(name="a"), a_run(name="b", bits_per_byte=None)])


def test_what_one_pass_claims_of_a_model_that_sees_ahead_takes_no_part() -> None:
    ahead = a_run(name="ahead", strict=False)
    scored = a_run(name="scored", strict=False, scoring="prefix-wise")
    collected = collect("x", [a_run(name="strict"), ahead, scored])
    assert [run.name for run in collected.runs] == ["scored", "strict"]
    assert collected.claimed == (ahead,)
    with pytest.raises(ValueError, match="no code length"):
        collect("x", [ahead])


def test_a_loss_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        collect("x", [replace(a_grid()[0], loss=0.0)])
