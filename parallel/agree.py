"""Work that may fail: what one rank cannot do ends for all of them alike, so that nobody waits for who has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from parallel.world import World

T = TypeVar("T")


class AgreedError(ValueError):
    """A ValueError that every rank raises, with the same words."""


def together(world: World, work: Callable[[], T]) -> T:
    """What `work` returns on this rank, once it is done on all; all ranks call this.

    If it raises ValueError on one, every rank raises `AgreedError` with the words of the lowest such rank.
    """
    result: list[T] = []
    mine: ValueError | None = None
    try:
        result.append(work())
    except ValueError as error:
        mine = error
    for rank, words in enumerate(world.gather(None if mine is None else str(mine))):
        if words is not None:
            raise AgreedError(words if rank == 0 else f"rank {rank}: {words}") from mine
    return result[0]


def by_first(world: World, work: Callable[[], Any]) -> Any:
    """What `work` returns on the first rank, which alone does it; all ranks call this. `AgreedError` as above.

    Anything that JSON can say.
    """
    return world.gather(together(world, work if world.is_first else lambda: None))[0]


def first_before_others(world: World, work: Callable[[], T]) -> T:
    """What `work` returns on this rank; the others begin when the first is done. `AgreedError` as above.

    For what the first leaves in a cache that the others find.
    """
    if world.is_first:
        result = together(world, work)
        together(world, lambda: None)
        return result
    together(world, lambda: None)
    return together(world, work)
