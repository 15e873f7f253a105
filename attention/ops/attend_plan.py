"""Which keys each tile of queries visits: the work list of the torch path of `attend`.

The lifetimes come as query intervals (`attention.lifetimes.query_intervals`): key j is met by the queries
start_j <= i < stop_j. A tile of queries visits the keys that at least one of its queries meets, in the order of
their birth, and nothing else:

* where neither starts nor stops ever decrease (causal, window, blocks, documents), these keys are one slice;
* else they are an index list that is carried from tile to tile: the dead leave it, the newborn are appended. So
  every pattern costs its living keys, and the list is never longer than the keys alive in one tile.

What is listed for a query depends only on keys it could have met by then, and their order is the order of birth:
a key that comes later, or one that lives longer, changes no bit of an earlier query's result.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROUND = 16  # tile widths are multiples of this: matrix products are faster, and treat all columns alike
FEW_QUERIES = 8  # up to as many, and
SMALL = 2**15  # up to as many pairs of query and key, one masked tile beats any plan
FEW_KEYS = 512  # up to as many keys met per query, tiles of 64 queries waste less than those of 128 gain
LOGITS = 2**21  # logits of a tile, over all its rows: 8 MiB of float32


@dataclass(frozen=True)
class Tile:
    """Queries lo <= i < hi and the `width` keys they visit.

    keys      a slice of the keys, the same one in every list; or int64 [L, width], where Nk stands for "no key"
    start, stop   [L, width]: the intervals of these keys
    masked    columns among which some key is not met by all of the tile's queries
    """

    lo: int
    hi: int
    width: int
    keys: slice | Tensor
    start: Tensor
    stop: Tensor
    masked: tuple[slice, ...]


class OneTile:
    """All queries against all keys, where a plan would cost more than it saves. start, stop: int32 [L, Nk]."""

    listed = False

    def __init__(self, start: Tensor, stop: Tensor, num_queries: int) -> None:
        self.widths = [start.shape[1]]
        everyone = slice(0, start.shape[1])
        self.only = Tile(0, num_queries, start.shape[1], everyone, start, stop, (everyone,))

    def __iter__(self) -> Iterator[Tile]:
        yield self.only


class TilePlan:
    """The tiles of L lists that are walked together. start, stop: int32 [L, Nk], in 0..Nq."""

    def __init__(self, start: Tensor, stop: Tensor, num_queries: int, tile: int) -> None:
        self.num_queries, self.tile = num_queries, tile
        self.listed = start.shape[0] > 1 or not (_ascending(start) and _ascending(stop))
        self.order: Tensor | None = None
        if self.listed:
            # Who is never met sorts behind everybody; its start is behind every tile, so it is never listed.
            start = start.masked_fill(stop <= start, num_queries)
            if not _ascending(start):
                self.order = torch.argsort(start, dim=-1, stable=True)
                start, stop = start.gather(-1, self.order), stop.gather(-1, self.order)
        self.start, self.stop = start, stop
        self._count()

    def _count(self) -> None:
        """[L, tiles]: how many keys have started and stopped by each tile's first and last query."""
        first = torch.arange(0, self.num_queries, self.tile, dtype=torch.int32, device=self.start.device)
        last = (first + (self.tile - 1)).clamp(max=self.num_queries - 1)
        first, last = (x.expand(self.start.shape[0], -1).contiguous() for x in (first, last))
        start = self.start.contiguous()
        stop = self.stop.contiguous()
        if self.listed:
            stop = stop.masked_fill(start == self.num_queries, self.num_queries).sort(-1).values
        self.started = torch.searchsorted(start, last, right=True)
        self.started_before = torch.searchsorted(start, first, right=True)
        self.stopped_before = torch.searchsorted(stop, first, right=True)
        self.stopped = torch.searchsorted(stop, last, right=True)
        visited = (self.started - self.stopped_before).amax(0).clamp(min=0)
        self.widths: list[int] = (-(-visited // ROUND) * ROUND).tolist()

    def __iter__(self) -> Iterator[Tile]:
        return self._lists() if self.listed else self._slices()

    def _bounds(self, number: int) -> tuple[int, int]:
        return number * self.tile, min((number + 1) * self.tile, self.num_queries)

    def _slices(self) -> Iterator[Tile]:
        num_keys = self.start.shape[1]
        counts = (self.stopped_before, self.started, self.stopped, self.started_before)
        for number, (a, b, dying, born) in enumerate(zip(*(x[0].tolist() for x in counts))):
            lo, hi = self._bounds(number)
            a = min(a, b) // ROUND * ROUND
            b = min(-(-b // ROUND) * ROUND, num_keys)
            keys = slice(a, b)
            masked = _columns((0, min(dying, b) - a), (max(born, a) - a, b - a))
            yield Tile(lo, hi, b - a, keys, self.start[:, keys], self.stop[:, keys], masked)

    def _lists(self) -> Iterator[Tile]:
        num_lists, num_keys = self.start.shape
        nobody = self.start.new_tensor([[self.num_queries, 0]]).expand(num_lists, 2)
        start = torch.cat([self.start, nobody[:, :1]], 1)
        stop = torch.cat([self.stop, nobody[:, 1:]], 1)
        order = None
        if self.order is not None:
            order = torch.cat([self.order, self.order.new_full((num_lists, 1), num_keys)], 1)
        listed = self.started.new_empty(num_lists, 0)
        met_by_first = (self.started_before - self.stopped_before).amin(0).tolist()
        newborn = torch.diff(self.started, prepend=self.started.new_zeros(num_lists, 1)).amax(0).tolist()
        begun = self.started.new_zeros(num_lists, 1)
        for number, width in enumerate(self.widths):
            lo, hi = self._bounds(number)
            until = self.started[:, number : number + 1]
            coming = begun + torch.arange(newborn[number], device=begun.device)
            coming = torch.where(coming < until, coming, num_keys)
            listed = _kept(torch.cat([listed, coming], 1), stop, lo, width, num_keys)
            begun = until
            start_tile, stop_tile = start.gather(1, listed), stop.gather(1, listed)
            keys = listed if order is None else order.gather(1, listed)
            dying = ((stop_tile < hi) & (start_tile <= lo)).any(0).nonzero()
            dead = (int(dying[0]), int(dying[-1]) + 1) if len(dying) else (0, 0)
            masked = _columns(dead, (met_by_first[number], width))
            yield Tile(lo, hi, width, keys, start_tile, stop_tile, masked)


def _kept(listed: Tensor, stop: Tensor, lo: int, width: int, nobody: int) -> Tensor:
    """Of each list the keys that a query from `lo` on meets, in their order, filled up to `width` with `nobody`."""
    alive = stop.gather(1, listed) > lo
    place = torch.where(alive, alive.cumsum(1) - 1, width)
    kept = listed.new_full((listed.shape[0], width + 1), nobody)
    return kept.scatter_(1, place, listed)[:, :width]


def _ascending(x: Tensor) -> bool:
    return bool((x[..., 1:] >= x[..., :-1]).all())


def _columns(first: tuple[int, int], second: tuple[int, int]) -> tuple[slice, ...]:
    """Two column ranges without the empty ones, joined where they touch."""
    ranges = [r for r in (first, second) if r[1] > r[0]]
    if len(ranges) == 2 and first[1] >= second[0]:
        ranges = [(min(first[0], second[0]), max(first[1], second[1]))]
    return tuple(slice(*r) for r in ranges)


@dataclass(frozen=True)
class Part:
    """A rectangle of examples and key heads that walk their tiles together.

    lists: shape [b or 1, g or 1, r or 1] of the plan's L lists, 1 where rows share them.
    """

    examples: slice
    heads: slice
    lists: tuple[int, int, int]
    plan: TilePlan | OneTile


def make_parts(
    start: Tensor, stop: Tensor, *, batch: int, kv_heads: int, group: int, num_queries: int
) -> tuple[Part, ...]:
    """The parts that cover all rows, each with its plan. start, stop: query intervals [B or 1, G or 1, r or 1, Nk]."""
    parts = []
    num_keys = start.shape[-1]
    for heads, living in _alike_heads(start, stop, kv_heads, num_queries):
        tile = num_queries if _is_small(num_queries, num_keys) else 64 if living <= FEW_KEYS else 128
        whole = _plan(start, stop, slice(0, batch), heads, num_queries, tile)
        rows = max(1, LOGITS // max(1, group * tile * max(whole.plan.widths, default=0)))
        for examples, some_heads in _rectangles(batch, heads, rows):
            same = whole.lists == (1, 1, 1) or (examples, some_heads) == (whole.examples, whole.heads)
            part = whole if same else _plan(start, stop, examples, some_heads, num_queries, tile)
            parts.append(Part(examples, some_heads, part.lists, part.plan))
    return tuple(parts)


def _plan(start: Tensor, stop: Tensor, examples: slice, heads: slice, num_queries: int, tile: int) -> Part:
    for axis, mine in enumerate((examples, heads)):
        if start.shape[axis] > 1:
            start, stop = (t.narrow(axis, mine.start, mine.stop - mine.start) for t in (start, stop))
    lists = (start.shape[0], start.shape[1], start.shape[2])
    start, stop = start.flatten(0, 2), stop.flatten(0, 2)
    plan = OneTile(start, stop, num_queries) if tile == num_queries else TilePlan(start, stop, num_queries, tile)
    return Part(examples, heads, lists, plan)


def _is_small(num_queries: int, num_keys: int) -> bool:
    return num_queries <= FEW_QUERIES or num_queries * num_keys <= SMALL


def _alike_heads(start: Tensor, stop: Tensor, kv_heads: int, num_queries: int) -> Iterator[tuple[slice, float]]:
    """Ranges of key heads whose lists are about equally long (rows in one product are padded to the longest), and
    how many keys a query of them meets on average."""
    met = (stop - start).clamp(min=0).sum(-1, dtype=torch.float64).mean((0, 2)) / max(1, num_queries)
    living: list[float] = met.expand(kv_heads).tolist()
    first = 0
    for head in range(1, kv_heads + 1):
        here = living[first : head + 1]
        if head == kv_heads or max(here) > 1.5 * min(here) + ROUND:
            yield slice(first, head), sum(living[first:head]) / (head - first)
            first = head


def _rectangles(batch: int, heads: slice, rows: int) -> Iterator[tuple[slice, slice]]:
    """`batch` examples by `heads`, cut into rectangles of at most `rows` rows."""
    num_heads = heads.stop - heads.start
    examples_at_once, heads_at_once = max(1, rows // num_heads), min(rows, num_heads)
    for example in range(0, batch, examples_at_once):
        for head in range(heads.start, heads.stop, heads_at_once):
            yield (
                slice(example, min(example + examples_at_once, batch)),
                slice(head, min(head + heads_at_once, heads.stop)),
            )
