"""Whole runs with ZeRO: the rows, evaluations and checkpoints of plain torch in one process."""

from pathlib import Path

import pytest
import torch

from lmtrain import checkpoint
from lmtrain.train import DONE
from tests.lmtrain.test_ranks import CODES, PLAIN, STREAM, assert_alike, rows_of, run


def zero(stage: int) -> list[str]:
    words = ["parallel.engine=deepspeed", f"parallel.zero={stage}"]
    spread = ["parallel.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"]
    return words + (spread if stage == 3 else [])


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
