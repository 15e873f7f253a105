"""What one rank cannot do ends for all, with the same words."""

from typing import Any

import pytest

from parallel.agree import AgreedError, by_first, first_before_others, together
from parallel.world import ALONE, World
from tests.processes import run_ranks


def told(call: Any) -> Any:
    try:
        return call()
    except AgreedError as error:
        return f"{type(error.__cause__).__name__}: {error}"


def refuse(world: World, *ranks: int) -> int:
    if world.rank in ranks:
        raise ValueError(f"no luck on {world.rank}")
    return world.rank


def work(world: World) -> list[Any]:
    return [
        told(lambda: together(world, lambda: refuse(world))),
        told(lambda: together(world, lambda: refuse(world, 1))),
        told(lambda: together(world, lambda: refuse(world, 0, 1))),
        told(lambda: by_first(world, lambda: ["of", world.rank])),
        told(lambda: by_first(world, lambda: refuse(world, 0))),
        told(lambda: first_before_others(world, lambda: refuse(world))),
        told(lambda: first_before_others(world, lambda: refuse(world, 0))),
        told(lambda: first_before_others(world, lambda: refuse(world, 1))),
    ]


def test_all_ranks_hear_the_same() -> None:
    first, second = run_ranks(2, work)
    assert first[:3] == [0, "NoneType: rank 1: no luck on 1", "ValueError: no luck on 0"]
    assert second[:3] == [1, "ValueError: rank 1: no luck on 1", "ValueError: no luck on 0"]
    assert first[3] == second[3] == ["of", 0]
    assert (first[4], second[4]) == ("ValueError: no luck on 0", "NoneType: no luck on 0")
    assert (first[5], second[5]) == (0, 1)
    assert (first[6], second[6]) == ("ValueError: no luck on 0", "NoneType: no luck on 0")
    assert (first[7], second[7]) == ("NoneType: rank 1: no luck on 1", "ValueError: rank 1: no luck on 1")


def in_turn(world: World, folder: Any) -> bool:
    def build() -> bool:
        found = (folder / "made").exists()
        (folder / "made").touch()
        return found

    return first_before_others(world, build)


def test_the_others_find_what_the_first_has_made(tmp_path: Any) -> None:
    assert run_ranks(3, in_turn, tmp_path) == [False, True, True]


def test_alone() -> None:
    assert together(ALONE, lambda: 3) == by_first(ALONE, lambda: 3) == first_before_others(ALONE, lambda: 3) == 3
    with pytest.raises(AgreedError, match=r"^no luck on 0$"):
        together(ALONE, lambda: refuse(ALONE, 0))
