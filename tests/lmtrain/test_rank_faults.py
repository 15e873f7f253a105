"""A rank that fails, is gone or stands still ends the job on all ranks, with the reason; later it can go on.

Each of these runs real processes that find each other as under torchrun.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data.loader
import lmtrain.evaluation.validation
import lmtrain.fault
from lmtrain.run import read_metrics, read_status
from lmtrain.start import USER_ERROR, start
from lmtrain.train import DONE, STOPPED
from tests.lmtrain import tiny
from tests.processes import exit_codes, started_ranks

CRASHED = 1
PATIENCE = "parallel.timeout=8"  # of the watch, where it is to lose it


def work(folder: Path, words: list[str], fault: str = "", mishap: Callable[[], None] | None = None) -> int:
    """One rank of the run in `folder`, with a fault (`lmtrain.fault`), or a mishap on rank 1."""
    os.environ["LMTRAIN_FAULT"] = fault
    if mishap is not None and os.environ["RANK"] == "1":
        mishap()
    try:
        return start(folder / "tiny.yaml", [*tiny.settings(folder), *words])
    except ValueError as error:
        print(f"told: {error}", file=sys.stderr)
        return USER_ERROR


def run(folder: Path, *words: str, fault: str = "", mishap: Any = None) -> list[int | None]:
    tiny.write(folder)
    with started_ranks(2, folder, work, folder, list(words), fault, mishap) as processes:
        return exit_codes(processes)


def failed(folder: Path) -> str:
    """Why the run says it failed."""
    status = read_status(folder / "run")
    assert status is not None
    assert (status.state, status.checkpoint) == ("failed", "checkpoints/step-4")
    assert (folder / "run/log.txt").read_text().splitlines()[-1] == f"failed: {status.reason}"
    return status.reason


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "run")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder) == [DONE, DONE]
    return losses(folder)


@pytest.mark.fault(11)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception(tmp_path: Path, undisturbed: list[tuple[int, float]], rank: int) -> None:
    assert run(tmp_path, fault=f"step=6:raise:rank={rank}") == [CRASHED, CRASHED]
    assert failed(tmp_path) == f"rank {rank} is at step 6, the update: RuntimeError: raised on purpose at step 6"
    other = (tmp_path / f"{1 - rank}.err").read_text()
    assert f"rank {1 - rank} ends: rank {rank} is at step 6" in other
    assert run(tmp_path) == [DONE, DONE]
    assert losses(tmp_path) == undisturbed


def unreadable() -> None:
    real = data.loader.Loader.step

    def step(self: Any, first_sample: int) -> Any:
        if first_sample == 20:
            raise OSError("the disk with the tokens is gone")
        return real(self, first_sample)

    data.loader.Loader.step = step  # type: ignore[method-assign]


@pytest.mark.fault(11)
def test_an_exception_in_the_loader_of_one_rank(tmp_path: Path) -> None:
    assert run(tmp_path, mishap=unreadable) == [CRASHED, CRASHED]
    assert failed(tmp_path) == "rank 1 is at step 6, its batches: OSError: the disk with the tokens is gone"


@pytest.mark.fault(11)
@pytest.mark.parametrize("rank", [0, 1])
def test_sigkill(tmp_path: Path, undisturbed: list[tuple[int, float]], rank: int) -> None:
    codes = run(tmp_path, fault=f"step=6:kill:rank={rank}")
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, CRASHED)
    reason = failed(tmp_path)
    assert f"rank {rank} (last seen at " in reason
    assert f"rank {1 - rank} is at step 6, " in reason
    assert run(tmp_path) == [DONE, DONE]
    assert losses(tmp_path) == undisturbed


@pytest.mark.fault(11)
@pytest.mark.parametrize("rank", [0, 1])
def test_sigstop(tmp_path: Path, rank: int) -> None:
    tiny.write(tmp_path)
    with started_ranks(2, tmp_path, work, tmp_path, [PATIENCE], f"step=6:stall:rank={rank}") as processes:
        assert exit_codes([processes[1 - rank]]) == [CRASHED]
        assert f"nothing was heard for 8 s of rank {rank} (last seen at " in failed(tmp_path)
        stacks = (tmp_path / f"{1 - rank}.err").read_text()
        assert "its threads:" in stacks
        assert "in sum_" in stacks, "the main thread waits in a collective"
        os.kill(processes[rank].pid or 0, signal.SIGCONT)
        assert exit_codes([processes[rank]]) == [CRASHED]
    assert "nothing was heard" in failed(tmp_path), "who comes back finds that the job has ended"


def stuck() -> None:
    def never(step: int) -> None:
        while step == 6:
            time.sleep(0.01)

    lmtrain.fault.before_update = never


@pytest.mark.fault(11)
def test_a_main_thread_that_hangs(tmp_path: Path) -> None:
    assert run(tmp_path, PATIENCE, mishap=stuck) == [CRASHED, CRASHED]
    expected = "rank 1 (last seen at step 6, the update) did not come any further for 8 s, and others wait; rank "
    assert failed(tmp_path).startswith(expected)
    assert "in never" in (tmp_path / "1.err").read_text()


def interrupted() -> None:
    real = lmtrain.evaluation.validation.evaluate

    def evaluate(*words: Any, **names: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*words, **names)

    lmtrain.evaluation.validation.evaluate = evaluate


@pytest.mark.fault(7)
def test_ctrl_c_on_one_rank_while_evaluating(tmp_path: Path, undisturbed: list[tuple[int, float]]) -> None:
    assert run(tmp_path, mishap=interrupted) == [STOPPED, STOPPED]
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.step, status.reason) == ("stopped", 4, "SIGINT")
    assert status.checkpoint == "checkpoints/step-4"


@pytest.mark.fault(15)
def test_a_mistake_is_told_once_and_ends_all(tmp_path: Path) -> None:
    assert run(tmp_path, "train.steps=none", "train.batch_tokens=96") == [USER_ERROR, USER_ERROR]
    told, silence = ((tmp_path / f"{rank}.err").read_text() for rank in (0, 1))
    assert "train.steps=none" in told
    assert "train.batch_tokens=96: not a multiple of data.seq_len 32 x ranks 2; nearest: 128" in told
    assert silence == ""
    assert not (tmp_path / "run").exists()
    assert run(tmp_path, f"data.path={tmp_path}/none.txt") == [USER_ERROR, USER_ERROR], "the first rank alone looks"
    assert "none.txt" in (tmp_path / "0.err").read_text()
    assert (tmp_path / "1.err").read_text() == ""


@pytest.mark.fault(11)
def test_a_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    with started_ranks(2, tmp_path, alone, tmp_path) as processes:
        assert exit_codes(processes) == [CRASHED, 7]
    assert "of 2 ranks these did not start within 1 s: 1" in (tmp_path / "0.err").read_text()


def alone(folder: Path) -> int:
    if os.environ["RANK"] == "1":
        return 7
    from parallel.world import join

    with join(timeout=1.0):
        return 0
