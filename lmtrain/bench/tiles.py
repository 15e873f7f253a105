"""What tiling costs the kernels: pairs that they visit, a whole tile at a time, over pairs that live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from attention.kernels.plan import Plan, visited_pairs
from lmtrain.bench.subjects import Attend, Flex, Subject, num_keys
from lmtrain.table import table

LENGTHS = (8192, 16384, 32768, 65536, 131072)
TILE = 128  # queries and keys


@dataclass(frozen=True)
class Waste:
    """Of one pattern at one length: living pairs, and those visited forward and backward; over all query heads."""

    name: str
    length: int
    living: int
    forward: int
    backward: int


def tile_waste(subjects: Iterable[Subject], lengths: Iterable[int] = LENGTHS) -> Iterator[Waste]:
    """Of each subject that is attention over a pattern, at each length; counted, not run."""
    for subject in subjects:
        if isinstance(subject, Attend) and not isinstance(subject, Flex):
            for length in lengths:
                yield _waste(subject, length)


def _waste(subject: Attend, length: int) -> Waste:
    life, heads = subject.pattern(length), subject.heads
    time = torch.arange(length, dtype=torch.int32)
    plan = Plan(life, time, kv_heads=heads.kv_heads, num_keys=num_keys(life))
    forward, backward = visited_pairs(plan, TILE, TILE, batch=1, heads=heads.heads)
    return Waste(subject.name, length, int(subject.pairs(length)), forward, backward)


def format_waste(wastes: list[Waste]) -> str:
    """A line per pattern, a column per length; nothing of nothing."""
    if not wastes:
        return ""
    lengths = sorted({waste.length for waste in wastes})
    by_name: dict[str, dict[int, Waste]] = {}
    for waste in wastes:
        by_name.setdefault(waste.name, {})[waste.length] = waste
    lines = [[name, *(_ratios(found[n]) for n in lengths)] for name, found in by_name.items()]
    title = f"Visited pairs over living pairs, tiles of {TILE} x {TILE} (forward / backward)"
    return f"{title}\n" + table(["attention", *(f"T={n:,}" for n in lengths)], lines)


def _ratios(waste: Waste) -> str:
    return f"{waste.forward / waste.living:.2f} / {waste.backward / waste.living:.2f}"
