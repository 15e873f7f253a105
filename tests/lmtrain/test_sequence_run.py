"""Runs with `parallel.sequence`: rows and checkpoints of one process; what cannot be shared is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain import checkpoint
from lmtrain.config import ConfigError, load
from lmtrain.run import read_metrics
from lmtrain.setup import check_ranks
from lmtrain.train import DONE, train
from parallel.world import ALONE, World
from tests.lmtrain import tiny
from tests.processes import run_ranks

WORDS = [
    "model.dropout=0",
    "data.documents=reset",
    "train.micro_batch=2",
    "model.mixers.far={kind: vq, heads: 2, block: 8, codes: 4}",
    "train.activation_checkpointing=true",
]


def work(world: World, folder: Path, name: str, words: list[str]) -> Any:
    settings = [*tiny.settings(folder), f"run.dir={folder}/{name}", *words]
    return train(load(folder / "tiny.yaml", settings, ranks=world.size), world=world)


@pytest.mark.parametrize(
    ("ranks", "sequence", "stage"),
    [
        (2, 2, None),
        (4, 2, None),
        (2, 2, 3),
        *(pytest.param(2, 2, stage, marks=pytest.mark.slow) for stage in (1, 2)),
        *(pytest.param(4, 2, stage, marks=pytest.mark.slow) for stage in (1, 2, 3)),
    ],
)
def test_a_run_that_shares_sequences_is_a_run_of_one_process(
    tmp_path: Path, ranks: int, sequence: int, stage: int | None
) -> None:
    """By plain torch, and by each stage of ZeRO; alone, and beside other ranks that have rows of their own."""
    tiny.write(tmp_path)
    assert work(ALONE, tmp_path, "one", WORDS) == DONE
    engine = [] if stage is None else ["parallel.engine=deepspeed", f"parallel.zero={stage}"]
    words = [*WORDS, f"parallel.sequence={sequence}", *engine]
    assert run_ranks(ranks, work, tmp_path, "shared", words, sequence=sequence) == [DONE] * ranks

    one, shared = (read_metrics(tmp_path / name) for name in ("one", "shared"))
    assert len(one) == len(shared)
    for row, other in zip(one, shared, strict=True):
        assert (row["step"], row.get("batch"), row.get("split")) == (
            other["step"],
            other.get("batch"),
            other.get("split"),
        )
        assert other["loss"] == pytest.approx(row["loss"], abs=1e-6)
        assert other.get("auxiliary", 0) == pytest.approx(row.get("auxiliary", 0), abs=1e-9)
        assert ("sent_per_token" in other) == ("split" not in other)
    weights, others = (checkpoint.load(tmp_path / name / "checkpoints/step-12").tensors for name in ("one", "shared"))
    for group, members in weights.items():
        for key, tensor in members.items():
            torch.testing.assert_close(others[group][key], tensor, atol=2e-5, rtol=0, msg=f"{group} {key}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.stream=true"], r"parallel\.sequence.*data\.stream from what was read before"),
        (["parallel.sequence=40"], r"parallel\.sequence.*each rank needs a token at least of the 32"),
        (["train.compile=true"], r"parallel\.sequence.*train\.compile"),
        (
            ["model.mixers.far={kind: routing, heads: 2, selection: paper}"],
            r"parallel\.sequence.*model\.mixers\.far cannot share a sequence",
        ),
        (["train.batch_tokens=96"], r"train\.batch_tokens.*not a multiple of data\.seq_len 32 x ranks 2"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    tiny.write(tmp_path)
    overrides = {word.partition("=")[0]: word for word in [*tiny.settings(tmp_path), "parallel.sequence=2", *words]}
    with pytest.raises(ConfigError, match=rf"(?s){message}"):
        load(tmp_path / "tiny.yaml", list(overrides.values()), ranks=4)


def test_ranks_that_share_sequences_read_the_same_ones(tmp_path: Path) -> None:
    """4 ranks, 2 of which share: batches need 2 sequences only."""
    tiny.write(tmp_path)
    words = [*tiny.settings(tmp_path), "train.batch_tokens=64", "train.micro_batch=1"]
    load(tmp_path / "tiny.yaml", [*words, "parallel.sequence=2"], ranks=4)
    with pytest.raises(ConfigError, match=r"x ranks 4"):
        load(tmp_path / "tiny.yaml", words, ranks=4)


def test_too_few_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write(tmp_path)
    config = load(tmp_path / "tiny.yaml", [*tiny.settings(tmp_path), "parallel.sequence=2"])
    for started, wrong in (("1", True), ("3", True), ("4", False)):
        monkeypatch.setenv("WORLD_SIZE", started)
        problems = check_ranks(config)
        assert [problem.key for problem in problems] == ["parallel.sequence"] * wrong
        assert all(f"{started} started" in problem.message for problem in problems)
