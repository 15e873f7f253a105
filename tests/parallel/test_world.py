"""Who is who among several processes, and what they agree on."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.world import ALONE, World, join, launched
from tests.processes import SECONDS, begin, run_ranks


def test_alone_nobody_is_asked() -> None:
    tensor = torch.ones(2)
    ALONE.sum_([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert ALONE.largest(3) == 3
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.is_first
    with join() as world:
        assert world is ALONE


def _places(world: World) -> tuple[int, ...]:
    return world.rank, world.data_rank, world.sequence_rank, world.data_size, world.size


def test_adjacent_ranks_share_rows() -> None:
    assert run_ranks(4, _places, sequence=2) == [(0, 0, 0, 2, 4), (1, 0, 1, 2, 4), (2, 1, 0, 2, 4), (3, 1, 1, 2, 4)]


def _agreement(world: World) -> Any:
    tensors = [torch.full((2, 3), float(world.rank)), torch.tensor(world.rank), torch.full((), 2.0 * world.rank)]
    world.sum_(tensors)
    words = world.gather({"rank": world.rank, "words": "x" * 100 * world.rank})
    return [t.tolist() for t in tensors], world.largest(7 - world.rank), [len(word["words"]) for word in words]


def test_sums_maxima_and_words() -> None:
    expected = ([[[3.0] * 3] * 2, 3, 6.0], 7, [0, 100, 200])
    assert run_ranks(3, _agreement) == [expected] * 3


def _to_first(world: World) -> Any:
    mine = {
        f"{world.rank}.x": torch.full((world.rank + 1, 2), float(world.rank)),
        f"{world.rank}.flag": torch.tensor(True),
    }
    if world.rank == 2:
        mine["2.empty"] = torch.zeros(0, 3, dtype=torch.int32)
        mine["2.strided"] = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T
    collected = world.to_first(mine)
    return {name: (str(t.dtype), t.tolist()) for name, t in collected.items()}


def test_tensors_of_all_ranks_on_the_first() -> None:
    first, second, third = run_ranks(3, _to_first)
    assert list(second) == ["1.x", "1.flag"]
    assert first == {"0.x": first["0.x"], "0.flag": ("torch.bool", True)} | second | third
    assert first["2.x"] == ("torch.float32", [[2.0, 2.0]] * 3)
    assert first["2.strided"] == ("torch.bfloat16", [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])
    assert first["2.empty"] == ("torch.int32", [])


OPTIMIZES = """
import sys
from pathlib import Path
import torch
from torch.distributed import FileStore
from parallel.world import join

def of_gloo():
    return [task for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]

with join(store=FileStore(sys.argv[1], 2)) as world:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.sum().backward()
    torch.optim.AdamW([weight]).step()
    world.barrier()
    assert of_gloo()
assert not of_gloo()
"""


def test_no_thread_of_a_group_is_left_when_python_ends(tmp_path: Path) -> None:
    """In interpreters of their own: it depends on what was imported before."""
    started = [
        begin(
            [sys.executable, "-c", OPTIMIZES, str(tmp_path / "store")],
            env={**os.environ, "RANK": rank, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in "01"
    ]
    assert [process.wait(SECONDS) for process in started] == [0, 0]


def _misfit(world: World) -> None:
    if world.rank == 1:
        raise RuntimeError("out of luck")
    world.barrier()


def test_a_failing_rank_is_named() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1.*out of luck"):
        run_ranks(2, _misfit)


def _hang(world: World) -> None:
    if world.rank == 0:
        world.barrier()
    else:
        torch.multiprocessing.get_context("spawn").Event().wait()


def test_a_hanging_rank_shows_its_stack() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 still at work.*_hang"):
        run_ranks(2, _hang, seconds=4.0)


def test_a_sequence_that_does_not_divide_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launched() == 3
    with pytest.raises(ValueError, match=r"parallel\.sequence: 2 ranks share a row.* 3 processes"), join(2):
        pass
