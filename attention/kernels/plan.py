"""Which tiles of queries and keys meet: the work list of the kernels of `attend`, made where they run.

The keys of a row (one example, one key head) are sorted by (generation, birth). Then the keys of a generation that a
tile of queries can meet lie in one run: from the first key at which the greatest death so far exceeds the tile's
first time, to the last one born by its last time. Inside it those that live through the whole tile need no mask.
Backward, a tile of keys meets one run of queries, from its least birth to its greatest death.

Runs are four numbers (first, inner, outer, last): visited are first..last-1, unmasked inner..outer-1, a whole number
of tiles. Nothing here waits for the device once generations are given, so it serves keys chosen by their scores; and
nothing is larger than tiles x generations.

Legend: R rows; B, G examples and key heads (1 long where all are alike), r query heads per key head, Nq queries, Nk
keys, C generations, M tiles of queries, N tiles of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from attention.lifetimes import FOREVER, Lifetimes, unexpanded

Made = TypeVar("Made")

GENERATIONS = 4
"""Most generations of a plan; a larger `Lifetimes.generation` counts as the last one."""

_APART = 1 << 33  # between generations, in 64 bits: more than any time

PROGRAMS = 4 * 132
"""Programs that fill a large GPU: no program of the backward pass works longer than the fair share of so many."""

SHORTEST_SEGMENT = 16  # tiles: shorter runs of queries are not worth the sum behind a split


@dataclass(frozen=True)
class KeyTiles:
    """Tiles of keys and the work on them, in the backward pass.

    tiles: int32 [B, G, N, 4]: first key, one past the last, first partial sum, number of segments
    runs: int32 [B, G, r, N, 4]: each head's run of queries
    items: int32 [B, G, items, 2]: (tile, segment) per program, long ones first; tile -1: nothing to do
    partials: partial sums to reserve per row, 0 where no run is split
    """

    tiles: Tensor
    runs: Tensor
    items: Tensor
    partials: int


class Plan:
    """The order of the keys, and the runs of tiles of any size.

    order: int32 [B, G, Nk], for each place the key that stands there; sorted: whether it is another order than given.
    birth, death: int32 [B, G, Nk], in that order; time: int32 [B, H or 1, Nq].
    """

    def __init__(self, life: Lifetimes, time: Tensor, *, kv_heads: int, num_keys: int) -> None:
        birth, death = torch.broadcast_tensors(unexpanded(life.birth, num_keys), unexpanded(life.death, num_keys))
        self.kv_heads = kv_heads
        self._made: dict[Any, Any] = {}
        self.time = unexpanded(time, time.shape[-1]).clone()
        if life.generation is not None:
            self.generations = GENERATIONS
            given = unexpanded(life.generation, num_keys).long().clamp(0, GENERATIONS - 1)
            birth, death, generation = torch.broadcast_tensors(birth, death, given)
            self.sorted = True
        else:
            generation, self.generations = _own_generations(birth, death)
            self.sorted = not _ascends(generation * _APART + birth)
        if self.sorted:
            order = (generation * _APART + birth).argsort(dim=-1, stable=True)
            birth, death, generation = (x.gather(-1, order) for x in (birth, death, generation))
            self.order = order.int()
        else:
            self.order = torch.arange(num_keys, dtype=torch.int32, device=birth.device).expand(birth.shape).contiguous()
        # Copies: a plan is remembered for as long as the lifetimes that it is made from live, and must not hold them.
        self.birth, self.death, self._generation = (x.clone().contiguous() for x in (birth, death, generation))

    @cached_property
    def edges(self) -> Tensor:
        """[B, G, C + 1]: where each generation begins; the last one ends at Nk."""
        wanted = torch.arange(self.generations + 1, device=self.birth.device)
        return torch.searchsorted(self._generation, wanted.expand(*self.birth.shape[:2], -1).contiguous())

    @cached_property
    def _time_by_group(self) -> Tensor:
        """int64 [B, G or 1, r or 1, Nq]."""
        time = self.time.long()
        if time.shape[1] == 1:
            return time.unsqueeze(2)
        return time.unflatten(1, (self.kv_heads, -1))

    def query_runs(self, query_tile: int, key_tile: int) -> Tensor:
        """int32 [B, G, r, M, C, 4]: of each tile of queries, per generation, the run of keys it visits."""
        return self._once(("queries", query_tile, key_tile), lambda: self._runs_of_keys(query_tile, key_tile))

    def key_tiles(self, query_tile: int, key_tile: int, *, batch: int, heads: int) -> KeyTiles:
        """The work of the backward pass on tiles of keys, for so many examples and query heads."""
        sizes = query_tile, key_tile, heads // self.kv_heads, batch * self.kv_heads
        return self._once(("keys", *sizes), lambda: self._work_on_keys(*sizes))

    def _once(self, key: Any, make: Callable[[], Made]) -> Made:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _runs_of_keys(self, query_tile: int, key_tile: int) -> Tensor:
        time = self._time_by_group
        begin = torch.arange(0, time.shape[-1], query_tile, device=time.device)
        first_time = time[..., begin]
        last_time = time[..., (begin + query_tile - 1).clamp(max=time.shape[-1] - 1)]
        offset = self._generation * _APART
        birth, death = self.birth + offset, self.death + offset
        oldest = death.cummax(-1).values
        youngest = death.flip(-1).cummin(-1).values.flip(-1)
        first = self._count(oldest, first_time)
        last = self._count(birth, last_time.clamp(max=FOREVER - 1))  # padding, at FOREVER, meets nobody
        inner, outer = self._count(youngest, last_time), self._count(birth, first_time)
        return _runs(first, inner, outer, last, key_tile)

    def _count(self, ascending: Tensor, bound: Tensor) -> Tensor:
        """[B, G, r, M, C]: place of the first key of generation c above `bound` [B, G, r, M]."""
        number = torch.arange(self.generations, device=bound.device)
        wanted = bound[..., None] + number * _APART
        shape = torch.broadcast_shapes(wanted.shape[:2], ascending.shape[:2])
        wanted = wanted.expand(*shape, -1, -1, -1)
        rows = ascending.expand(*shape, -1).contiguous()
        found = torch.searchsorted(rows, wanted.flatten(2).contiguous(), right=True).view(wanted.shape)
        begin = self.edges[..., None, None, :-1]
        return torch.minimum(torch.maximum(found, begin), self.edges[..., None, None, 1:])

    def _work_on_keys(self, query_tile: int, key_tile: int, group: int, rows: int) -> KeyTiles:
        first, last = self._cut(key_tile)
        runs = self._runs_of_queries(first, last, query_tile, key_tile)
        number = self.time.shape[-1]
        return _divide(first, last, runs, group=group, rows=rows, query_tile=query_tile, num_queries=number)

    def _cut(self, size: int) -> tuple[Tensor, Tensor]:
        """[B, G, N]: first key of each tile and one past its last; no tile straddles generations, some are empty."""
        edges, number = self.edges, -(-self.birth.shape[-1] // size) + self.generations - 1
        per = -((edges[..., :-1] - edges[..., 1:]) // size)
        through = per.cumsum(-1)
        index = torch.arange(number, device=edges.device).expand(*edges.shape[:2], -1).contiguous()
        mine = torch.searchsorted(through, index, right=True)
        used = mine < self.generations
        mine = mine.clamp(max=self.generations - 1)
        first = edges.gather(-1, mine) + (index - (through - per).gather(-1, mine)) * size
        last = torch.minimum(first + size, edges.gather(-1, mine + 1))
        return torch.where(used, first, 0), torch.where(used, last, 0)

    def _runs_of_queries(self, first: Tensor, last: Tensor, query_tile: int, key_tile: int) -> Tensor:
        """[B, G, r, N, 4] of the tiles of keys first..last-1."""
        index = first[..., None] + torch.arange(key_tile, device=first.device)
        inside = index < last[..., None]
        index = index.clamp(max=max(self.birth.shape[-1] - 1, 0)).flatten(-2)
        birth, death = (x.long().gather(-1, index).view(inside.shape) for x in (self.birth, self.death))
        lives = inside & (death > birth)
        never, always = _APART, -_APART
        bounds = (
            birth.masked_fill(~lives, never).amin(-1),
            death.masked_fill(~inside, never).amin(-1),
            birth.masked_fill(~inside, always).amax(-1),
            death.masked_fill(~lives, always).amax(-1),
        )
        time = self._time_by_group
        shape = torch.broadcast_shapes(time.shape[:3], (*first.shape[:2], 1))
        time = time.expand(*shape, -1).contiguous()
        found = [torch.searchsorted(time, x.unsqueeze(2).expand(*shape, -1).contiguous()) for x in bounds]
        least_birth, least_death, greatest_birth, greatest_death = found
        whole = ((last - first) == key_tile).unsqueeze(2)
        # Queries at FOREVER meet nobody, whatever lives: deaths of FOREVER already end before them.
        greatest_death = torch.maximum(greatest_death, least_birth)
        inner = torch.where(whole, greatest_birth, greatest_death)
        return _runs(least_birth, inner, least_death, greatest_death, query_tile)


def visited_pairs(plan: Plan, query_tile: int, key_tile: int, *, batch: int, heads: int) -> tuple[int, int]:
    """(query, key) places computed forward, and backward on tiles of keys, over batch and query heads.

    Each visited tile counts whole, so that the ratio to the living pairs is what tiling costs.
    """
    group = heads // plan.kv_heads
    forward = plan.query_runs(query_tile, key_tile)
    backward = plan.key_tiles(query_tile, key_tile, batch=batch, heads=heads).runs
    counts = []
    for runs, size in ((forward, key_tile), (backward, query_tile)):
        tiles = _tiles(runs, size).expand(batch, plan.kv_heads, group, *runs.shape[3:-1])
        counts.append(int(tiles.sum()) * query_tile * key_tile)
    return counts[0], counts[1]


def _own_generations(birth: Tensor, death: Tensor) -> tuple[Tensor, int]:
    """int64 generation of each key, and their number, where the mixer does not say. Waits for the device."""
    if _ascends(birth) and _ascends(death):
        return torch.zeros_like(birth, dtype=torch.int64), 1
    return (death == FOREVER).long(), 2


def _ascends(x: Tensor) -> bool:
    return bool((x[..., 1:] >= x[..., :-1]).all())


def _runs(first: Tensor, inner: Tensor, outer: Tensor, last: Tensor, tile: int) -> Tensor:
    """int32 [..., 4] with the unmasked part in whole tiles counted from `first`; empty: inner = outer = last."""
    last = torch.maximum(last, first)
    inner = first - (first - torch.maximum(inner, first)) // tile * tile
    outer = inner + (torch.minimum(outer, last) - inner).clamp(min=0) // tile * tile
    none = outer <= inner
    inner, outer = torch.where(none, last, inner), torch.where(none, last, outer)
    return torch.stack([first, inner, outer, last], -1).int().contiguous()


def _tiles(runs: Tensor, size: int) -> Tensor:
    """int64 [...]: tiles that each run visits."""
    first, inner, outer, last = runs.long().unbind(-1)
    return (outer - inner) // size - (-(last - first - (outer - inner)) // size)


def _divide(
    first: Tensor, last: Tensor, runs: Tensor, *, group: int, rows: int, query_tile: int, num_queries: int
) -> KeyTiles:
    """Long runs of queries in segments, so that keys who live for ever do not make one program work alone."""
    number, shape = first.shape[-1], runs.shape[:2]
    length = _tiles(runs, query_tile).expand(*shape, group, number).sum(2)
    total = length.sum(-1, keepdim=True)
    longest = group * -(-num_queries // query_tile)
    budget = -(-PROGRAMS // rows) if longest > SHORTEST_SEGMENT else 0
    fair = torch.clamp(-(-total // max(budget, 1)), min=SHORTEST_SEGMENT)
    segments = (-(-length // fair)).clamp(min=1)
    slots = torch.where(segments > 1, segments, 0)
    first, last = first.expand(*shape, -1), last.expand(*shape, -1)
    tiles = torch.stack([first, last, slots.cumsum(-1) - slots, segments], -1)

    order = (length // segments).argsort(dim=-1, descending=True, stable=True)
    through = segments.gather(-1, order).cumsum(-1)
    index = torch.arange(number + budget, device=first.device).expand(*shape, -1).contiguous()
    place = torch.searchsorted(through, index, right=True)
    used = place < number
    place = place.clamp(max=number - 1)
    tile = order.gather(-1, place)
    segment = index - (through - segments.gather(-1, order)).gather(-1, place)
    items = torch.stack([torch.where(used, tile, -1), torch.where(used, segment, 0)], -1)
    return KeyTiles(tiles.int().contiguous(), runs, items.int().contiguous(), 2 * budget)
