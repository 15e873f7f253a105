"""A process that may have no more memory says what takes most of it, and which setting makes that less."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import main
from lmtrain import exhausted
from lmtrain.run import read_status
from parallel.world import ALONE, World
from tests.lmtrain import tiny
from tests.processes import run_ranks

ROOM = 400 << 20
WIDE = ["model.dim=512", "data.seq_len=1024", "train.batch_tokens=65536", "train.micro_batch=64", "eval.every=0"]


def starved(world: World, folder: Path) -> int:
    """`lmtrain train` in a process that may take `ROOM` bytes more than it has, where a step takes many times that."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return main(["train", str(tiny.write(folder)), *tiny.settings(folder, *WIDE)])


@pytest.mark.fault(19)
def test_a_limit_on_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(1, starved, tmp_path) == [1]
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "failed"
    assert "the activations are the largest part" in status.reason
    assert "train.micro_batch" in status.reason


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("settings", "largest", "remedy"),
    [
        (WIDE, "activations", "train.micro_batch"),
        (["model.vocab_size=100000", "model.dim=8", "train.micro_batch=4"], "logits", "train.micro_batch"),
        (["model.dim=2048", "train.micro_batch=1"], "optimizer", "parallel.zero=3"),
    ],
)
def test_the_largest_part_and_what_makes_it_smaller(
    settings: list[str], largest: str, remedy: str, tmp_path: Path
) -> None:
    config = tiny.config(tmp_path, "model.vocab_size=256", *settings)
    told = exhausted.in_words(config, ALONE)
    assert f"the {largest} are the largest part" in told
    assert remedy in told.partition("choose")[2]


def test_which_errors_are_meant() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 55)
    assert exhausted.is_exhausted(error.value)
    assert exhausted.is_exhausted(torch.OutOfMemoryError("CUDA out of memory"))
    others: list[Any] = [RuntimeError("shapes do not match"), OSError(12, "Cannot allocate memory"), KeyError("x")]
    assert not any(map(exhausted.is_exhausted, others))
