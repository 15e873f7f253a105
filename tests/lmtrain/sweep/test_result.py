"""result.json and failure.json: what was written is read back, and whatever is wrong with one is named."""

import json

import pytest

from lmtrain.sweep.result import RunFailure, RunResult

RESULT = RunResult(
    name="mosa-s2-1",
    hash="0123456789ab",
    axes={"mixer": "mosa", "size": "s2", "keep": 64, "seed": 1},
    mixer="mosa",
    seed=1,
    parameters=1000,
    parameters_total=1500,
    tokens=4096,
    flops=3e9,
    flops_per_token=2.5e5,
    pairs=12.5,
    loss=1.5,
    bits_per_byte=None,
    sparsity=16,
    strict=True,
    seconds=3.5,
    tokens_per_second=1170.3,
    peak_memory=10**9,
    state_bytes={"65536": 1024},
    parent=None,
    group="mosa-s2-1",
    scoring="one-pass",
    command="python -m lmtrain train demo",
    environment={"python": "3.12"},
)


def test_what_was_written_is_read_back(tmp_path):
    RESULT.write(tmp_path)
    assert RunResult.read(tmp_path) == RESULT
    assert json.loads((tmp_path / "result.json").read_text())["version"] == 1
    assert RunFailure.read(tmp_path) is None
    failure = RunFailure("a", "0123", {"seed": 1}, 2, "out of memory", None, "a-0123/output.txt")
    failure.write(tmp_path)
    assert RunFailure.read(tmp_path) == failure


def test_everything_that_is_wrong_is_told_at_once():
    content = RESULT.to_json() | {"loss": "1.5", "seed": True, "scoring": "guess", "colour": "red", "pairs": None}
    content["state_bytes"] = {"65536": "much"}
    del content["group"]
    with pytest.raises(ValueError, match="group is missing") as error:
        RunResult.from_json(content, "here/result.json")
    message = str(error.value)
    assert message.startswith("here/result.json: ")
    for wrong in ("group is missing", "colour is unknown", "loss must be a number", "seed must be a whole number"):
        assert wrong in message
    for wrong in ("scoring must be one-pass or prefix-wise", "state_bytes must be a mapping to a number", "pairs must"):
        assert wrong in message


@pytest.mark.parametrize("tokens", [10**400, -(10**20), 2**63])
def test_a_number_that_nothing_can_have_counted_is_refused(tokens):
    with pytest.raises(ValueError, match="tokens must be a whole number"):
        RunResult.from_json(RESULT.to_json() | {"tokens": tokens})


@pytest.mark.parametrize("content", [[], 3, {}, {"version": 2}, RESULT.to_json() | {"version": 0}])
def test_another_version_is_refused(content):
    with pytest.raises(ValueError, match="this lmtrain reads 1"):
        RunResult.from_json(content)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "result.json").write_text('{"version": 1, ')
    with pytest.raises(ValueError, match=r"result\.json: not readable"):
        RunResult.read(tmp_path)
