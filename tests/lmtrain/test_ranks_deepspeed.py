"""Whole runs with ZeRO: the rows, evaluations and checkpoints of plain torch in one process."""

import os
import signal
from pathlib import Path

import pytest
import torch

from lmtrain import checkpoint
from lmtrain.train import DONE, GAVE_UP, STOPPED
from tests.lmtrain import tiny
from tests.lmtrain.test_rank_faults import CRASHED, failed, work
from tests.lmtrain.test_rank_faults import run as run_started
from tests.lmtrain.test_ranks import CODES, PLAIN, STREAM, assert_alike, rows_of, run
from tests.lmtrain.test_spikes import events
from tests.processes import exit_codes, started_ranks


def zero(stage: int) -> list[str]:
    words = ["parallel.engine=deepspeed", f"parallel.zero={stage}"]
    spread = ["parallel.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"]
    return words + (spread if stage == 3 else [])


@pytest.mark.fault(9)
def test_a_run_of_two_ranks_and_a_spoilt_step(tmp_path: Path) -> None:
    """The spoilt step comes behind the last checkpoint but one, and the same run of torch has one, too."""
    words = ["checkpoint.every=1", "checkpoint.keep=20"]
    assert run(1, tmp_path, "torch", *CODES, *words, fault="step=6:grad=nan") == [DONE]
    assert run(2, tmp_path, "zero", *CODES, *words, *zero(3), fault="step=6:grad=nan:rank=1") == [DONE] * 2
    assert_alike(tmp_path / "zero", tmp_path / "torch")
    assert [row["skipped"] for row in rows_of(tmp_path / "zero") if "skipped" in row] == [0] * 5 + [1] * 7
    before, after = (checkpoint.load(tmp_path / f"zero/checkpoints/step-{step}") for step in (5, 6))
    for group, members in before.tensors.items():
        assert all(torch.equal(tensor, after.tensors[group][name]) for name, tensor in members.items())
    log = (tmp_path / "zero/log.txt").read_text()
    assert log.splitlines()[0].split(",")[1] == (tmp_path / "torch/log.txt").read_text().splitlines()[0].split(",")[1]


@pytest.mark.fault(9)
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_roll_back(tmp_path: Path, stage: int) -> None:
    """Two samples of steps 6 and 7, one of each rank, spoil every update that reads them, until they are left out."""
    words = [*CODES, "train.max_skips=2", "checkpoint.every=5", "checkpoint.keep=20"]
    fault = "sample=20:grad=nan,sample=27:grad=nan"
    assert run(1, tmp_path, "torch", *words, fault=fault) == [DONE]
    assert run(2, tmp_path, "zero", *words, *zero(stage), fault=fault) == [DONE] * 2
    assert_alike(tmp_path / "zero", tmp_path / "torch")
    state = checkpoint.load(tmp_path / "zero/checkpoints/step-12").state
    assert (state["rollbacks"], state["unread"], state["skipped"]) == (1, [[20, 28]], 0)
    for name in ("torch", "zero"):
        (event,) = events(tmp_path / name, "rollback")
        assert (event["step"], event["to"], event["samples"]) == (7, 5, [20, 28])


@pytest.mark.fault(9)
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_gives_up(tmp_path: Path, stage: int) -> None:
    words = [*PLAIN, "train.max_skips=2", "train.max_rollbacks=2"]
    fault = "step=6:grad=nan:rank=0,step=7:grad=nan:rank=0"
    assert run(1, tmp_path, "torch", *words, fault=fault) == [GAVE_UP]
    assert run(2, tmp_path, "zero", *words, *zero(stage), fault=fault) == [GAVE_UP] * 2
    rows, expected = rows_of(tmp_path / "zero"), rows_of(tmp_path / "torch")
    assert [row.get("batch") for row in rows] == [row.get("batch") for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-6)
    assert [len(events(tmp_path / "zero", kind)) for kind in ("rollback", "skip")] == [2, 6]


@pytest.mark.fault(6)
@pytest.mark.slow
@pytest.mark.parametrize("words", [PLAIN, CODES, STREAM], ids=["plain", "codes", "stream"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoints_go_from_engine_to_engine(tmp_path: Path, stage: int, words: list[str]) -> None:
    assert run(1, tmp_path, "torch", *words) == [DONE]
    assert run(2, tmp_path, "zero", *words, *zero(stage)) == [DONE] * 2
    assert_alike(tmp_path / "zero", tmp_path / "torch")
    for name, ranks, engine, parent, exact in (
        ("same", 2, zero(stage), "zero", True),
        ("from-torch", 2, zero(stage), "torch", False),
        ("to-torch", 1, [], "zero", False),
        ("to-another", 1, zero(stage % 3 + 1), "zero", False),
    ):
        resume = tmp_path / parent / "checkpoints/step-8"
        assert run(ranks, tmp_path, name, *words, *engine, resume=resume) == [DONE] * ranks
        assert_alike(tmp_path / name, tmp_path / parent, first=8, exact=exact)


@pytest.mark.fault(11)
@pytest.mark.slow
@pytest.mark.parametrize("what", ["raise", "kill", "term"])
def test_a_rank_that_fails(tmp_path: Path, what: str) -> None:
    """The others wait for it in DeepSpeed's own groups, which know of no time limit."""
    words = [*zero(3), "parallel.timeout=6"]
    codes = run_started(tmp_path, *words, fault=f"step=6:{what}:rank=1")
    if what == "term":
        assert codes == [STOPPED, STOPPED]
    else:
        assert codes[0] == CRASHED
        assert codes[1] == (CRASHED if what == "raise" else -signal.SIGKILL)
        assert "rank 1" in failed(tmp_path)
    assert run_started(tmp_path, *words) == [DONE, DONE]
    assert [row["step"] for row in rows_of(tmp_path / "run") if "split" not in row] == list(range(1, 13))


@pytest.mark.fault(11)
@pytest.mark.slow
def test_a_rank_that_stands_still(tmp_path: Path) -> None:
    words = [*zero(3), "parallel.timeout=6"]
    tiny.write(tmp_path)
    with started_ranks(2, tmp_path, work, tmp_path, words, "step=6:stall:rank=1") as processes:
        assert exit_codes([processes[0]]) == [CRASHED]
        assert "nothing was heard for 6 s of rank 1" in failed(tmp_path)
        os.kill(processes[1].pid or 0, signal.SIGCONT)
        assert exit_codes([processes[1]]) == [CRASHED]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_that_share_a_row_count_as_data_ranks(tmp_path: Path, stage: int) -> None:
    plain = ["model.dropout=0.0", "train.micro_batch=1"]
    assert run(1, tmp_path, "torch", *plain) == [DONE]
    words = [*plain, *zero(stage), "parallel.sequence=2", "parallel.timeout=60"]
    assert run_started(tmp_path, *words) == [DONE, DONE]
    assert_alike(tmp_path / "run", tmp_path / "torch")
