"""Which keys each tile of queries visits: the work list of the torch path of `attend`.

The lifetimes come as query intervals (`attention.lifetimes.query_intervals`): key j is met by the queries
start_j <= i < stop_j. A tile of queries visits the keys that at least one of its queries meets, in the order of
their birth, and nothing else:

* where neither starts nor stops ever decrease (causal, window, blocks, documents), these keys are one slice; where
  the slices move on with the queries, tile after tile, many tiles fold into one batch of overlapping windows. Rows
  with slices of their own (lanes, clusters, queries that chose their head) walk alone, unless in many small steps;
* else they are an index list that is carried from tile to tile: the dead leave it, the newborn are appended. So
  every pattern costs its living keys, and the list is never longer than the keys alive in one tile.

What is listed for a query depends only on keys it could have met by then, and their order is the order of birth:
a key that comes later, or one that lives longer, changes no bit of an earlier query's result.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROUND = 16  # tile widths are multiples of this: matrix products are faster, and treat all columns alike
FEW_QUERIES = 8  # up to as many, and
SMALL = 2**15  # up to as many pairs of query and key, one masked tile beats any plan
SMALL_TILE, LARGE = 64, 128  # queries of a tile
FEW_KEYS = 512  # up to as many keys met per query, small tiles waste less than large ones gain,
HARDLY_MORE = 1.05  # unless those have so many times their logits at most (gated, 309 keys met: 0.28 s, not 0.33)
LOGITS = 2**21  # logits of a tile, over all its rows: 8 MiB of float32
FOLDED_LOGITS = 2**19  # logits of a fold
FULL_STEP = 2**17  # logits of a step from which on its fixed costs do not matter
KEPT_LISTS = 2**18  # entries of lists, 16 bytes each, up to which a plan is kept ready for the next walk


@dataclass(frozen=True)
class Tile:
    """Queries lo <= i < hi, in `count` tiles of equal size, and the `width` keys that each of them visits.

    keys      the number of the first key of a slice (of the first tile; the next ones' move on with the queries);
              or int64 [L, width], where Nk stands for "no key"
    start, stop   int32 [L, width], of folds [count or 1, width]: the intervals, from the tile's first query on
    masked    columns among which some key is not met by all of the tile's queries
    """

    lo: int
    hi: int
    count: int
    width: int
    keys: int | Tensor
    start: Tensor
    stop: Tensor
    masked: tuple[slice, ...]

    @staticmethod
    def of(lo: int, hi: int, keys: int | Tensor, start: Tensor, stop: Tensor, count: int = 1) -> "Tile":
        size = (hi - lo) // count
        dying, unborn = (_extent(x) for x in ((stop < size) & (start <= 0), start > 0))
        return Tile(lo, hi, count, start.shape[1], keys, start, stop, _joined(dying, unborn))


@dataclass(frozen=True)
class Part:
    """A rectangle of examples and key heads that walk their tiles together.

    lists: shape [b or 1, g or 1, r or 1] of the L lists, 1 where rows share them; listed: keys are index lists.
    """

    examples: slice
    heads: slice
    lists: tuple[int, int, int]
    tiles: Iterable[Tile]
    listed: bool = False


def make_parts(
    start: Tensor, stop: Tensor, *, batch: int, kv_heads: int, group: int, num_queries: int
) -> tuple[Part, ...]:
    """The parts that cover all rows. start, stop: query intervals [B or 1, G or 1, r or 1, Nk]."""
    parts: list[Part] = []
    for heads, living in _alike_heads(start, stop, kv_heads, num_queries):
        size = SMALL_TILE if living <= FEW_KEYS else LARGE
        everyone = slice(0, batch), heads
        lists, mine = _narrowed(start, stop, *everyone)
        if num_queries <= FEW_QUERIES or num_queries * start.shape[-1] <= SMALL:
            rows = _rows_at_once(group * num_queries * start.shape[-1])
            for rectangle in _rectangles(*everyone, rows):
                some, own = _narrowed(start, stop, *rectangle)
                parts.append(Part(*rectangle, some, [Tile.of(0, num_queries, 0, *own)]))
        elif lists == (1, 1, 1) and _ascending(mine[0]) and _ascending(mine[1]):
            parts += _sliced(mine[0][0], mine[1][0], everyone, group, num_queries, size)
        elif row_by_row := _sliced_alone(start, stop, everyone, group, num_queries, size, living):
            parts += row_by_row
        else:
            tiles = Lists.of(*mine, num_queries, size)
            for rectangle in _rectangles(*everyone, _rows_at_once(group * tiles.size * tiles.widest)):
                some, own = _narrowed(start, stop, *rectangle)
                shared = lists == (1, 1, 1) or rectangle == everyone
                mine_alone = tiles if shared else Lists(*own, num_queries, tiles.size)
                parts.append(Part(*rectangle, some, mine_alone, listed=True))
    return tuple(parts)


def _sliced(
    start: Tensor, stop: Tensor, everyone: tuple[slice, slice], group: int, num_queries: int, size: int
) -> list[Part]:
    """Parts of the rows that share one list of slices: all rows tile by tile, or row by row many tiles at once,
    whichever takes fewer steps."""
    batch, heads = everyone
    plain = _slice_runs(start, stop, num_queries, size)
    widest = max(run.end - run.begin for run in plain)
    rectangles = list(_rectangles(batch, heads, _rows_at_once(group * size * widest)))
    folded = _slice_runs(start, stop, num_queries, size, fold=FOLDED_LOGITS // (group * size))
    each = list(_rectangles(batch, heads, 1))
    if 2 * len(folded) * len(each) < len(plain) * len(rectangles):
        plain, rectangles = folded, each
    tiles = [run.tile(start, stop, num_queries, size) for run in plain]
    return [Part(*rectangle, (1, 1, 1), tiles) for rectangle in rectangles]


def _sliced_alone(
    start: Tensor, stop: Tensor, everyone: tuple[slice, slice], group: int, num_queries: int, size: int, living: float
) -> list[Part]:
    """Parts of rows with a list of slices each, many tiles at once; none if they are no slices, or if that takes more
    steps than to walk through lists of all rows, and small ones. living: keys that a query meets on average."""
    lists, (starts, stops) = _narrowed(start, stop, *everyone)
    each, together = list(_rectangles(*everyone, 1)), -(-num_queries // size)
    hopeless = len(each) > together and group * num_queries * living < FULL_STEP
    if lists[2] > 1 or hopeless or not (_ascending(starts) and _ascending(stops)):
        return []
    walks = []
    for rectangle in each:
        begin, end = (t[0] for t in _narrowed(start, stop, *rectangle)[1])
        of_row = _slice_runs(begin, end, num_queries, size, FOLDED_LOGITS // (group * size))
        walks.append((rectangle, begin, end, of_row))
    runs = [run for *_, of_row in walks for run in of_row]
    logits = group * size * sum(run.count * (run.end - run.begin) for run in runs)
    if len(runs) > together and logits < FULL_STEP * len(runs):
        return []
    return [
        Part(*rectangle, (1, 1, 1), [run.tile(begin, end, num_queries, size) for run in of_row])
        for rectangle, begin, end, of_row in walks
    ]


@dataclass(frozen=True)
class _Run:
    """`count` tiles from the `number`-th on, in one; begin..end: the keys of the first, the next ones' move on."""

    number: int
    count: int
    begin: int
    end: int

    def tile(self, start: Tensor, stop: Tensor, num_queries: int, size: int) -> Tile:
        """The tile, with the intervals of its keys; start, stop [Nk]."""
        lo, width = self.number * size, self.end - self.begin
        hi = min(lo + self.count * size, num_queries)
        if self.count == 1:
            starts, stops = (x[None, self.begin : self.end] - lo for x in (start, stop))
        else:
            here = lo + size * torch.arange(self.count, dtype=torch.int32, device=start.device)[:, None]
            keys = slice(self.begin, self.end + (self.count - 1) * size)
            starts, stops = (x[keys].unfold(0, width, size) - here for x in (start, stop))
            if bool(((starts == starts[:1]) & (stops == stops[:1])).all()):
                starts, stops = starts[:1], stops[:1]
        return Tile.of(lo, hi, self.begin, starts, stops, self.count)


def _slice_runs(start: Tensor, stop: Tensor, num_queries: int, size: int, fold: int = 0) -> list[_Run]:
    """Tiles of `size` queries whose keys are slices; start, stop [Nk] never decrease. Consecutive ones whose slices
    end `size` keys apart fold into one, up to `fold` keys in all."""
    num_keys = len(start)
    first = torch.arange(0, num_queries, size, dtype=torch.int32, device=start.device)
    last = (first + (size - 1)).clamp(max=num_queries - 1)
    begins = torch.searchsorted(stop, first, right=True).tolist()
    ends = torch.searchsorted(start, last, right=True).tolist()
    runs, number = [], 0
    while number < len(begins):
        begin, end = begins[number], ends[number]
        count, width = _fold(begins[number:], ends[number:], size, fold, last=num_queries // size - number)
        if count == 1:
            begin = min(begin, end) // ROUND * ROUND
            end = min(-(-end // ROUND) * ROUND, num_keys)
        else:
            begin = end - width
        runs.append(_Run(number, count, begin, end))
        number += count
    return runs


def _fold(begins: list[int], ends: list[int], size: int, limit: int, last: int) -> tuple[int, int]:
    """How many of the next tiles to fold, and the width of their windows, a multiple of `size`."""
    count, width, needed = 0, 0, 0
    for number, (begin, end) in enumerate(zip(begins[:last], ends[:last])):
        wider = max(width, -(-(end - begin) // size) * size)
        needed += end - begin
        moved_on = end == ends[0] + number * size
        if not moved_on or wider > ends[0] or wider * (number + 1) > min(limit, 1.25 * needed + size):
            break
        count, width = number + 1, wider
    return max(count, 1), width


class Lists:
    """The tiles of L index lists that are walked together. start, stop: int32 [L, Nk], in 0..Nq."""

    def __init__(self, start: Tensor, stop: Tensor, num_queries: int, size: int) -> None:
        self.num_queries, self.size = num_queries, size
        # Who is never met sorts behind everybody: its start is behind every tile, so it is never listed.
        start = start.masked_fill(stop <= start, num_queries)
        self.order: Tensor | None = None
        if not _ascending(start):
            self.order = torch.argsort(start, dim=-1, stable=True)
            start, stop = start.gather(-1, self.order), stop.gather(-1, self.order)
        self.start, self.stop = start.contiguous(), stop.contiguous()
        first = torch.arange(0, num_queries, size, dtype=torch.int32, device=start.device)
        first = first.expand(start.shape[0], -1).contiguous()
        last = (first + (size - 1)).clamp(max=num_queries - 1)
        self.started = torch.searchsorted(self.start, last, right=True)  # [L, tiles]
        ends = stop.masked_fill(start == num_queries, num_queries).sort(-1).values
        visited = (self.started - torch.searchsorted(ends, first, right=True)).amax(0)
        self.widths: list[int] = (-(-visited // ROUND) * ROUND).tolist()
        self.ready: list[Tile] = []

    @staticmethod
    def of(start: Tensor, stop: Tensor, num_queries: int, size: int) -> "Lists":
        """Tiles of `size` queries, or of LARGE where that hardly adds logits: keys that outlive a tile are listed once
        for twice as many queries."""
        tiles = Lists(start, stop, num_queries, size)
        if size < LARGE:
            larger = Lists(start, stop, num_queries, LARGE)
            if LARGE * sum(larger.widths) <= HARDLY_MORE * size * sum(tiles.widths):
                return larger
        return tiles

    @property
    def widest(self) -> int:
        return max(self.widths)

    def __iter__(self) -> Iterator[Tile]:
        if self.start.shape[0] * sum(self.widths) > KEPT_LISTS:
            return self._walk()
        self.ready = self.ready or list(self._walk())
        return iter(self.ready)

    def _walk(self) -> Iterator[Tile]:
        num_lists, num_keys = self.start.shape
        nobody = self.start.new_tensor([self.num_queries, 0, num_keys]).expand(num_lists, 3)
        start = torch.cat([self.start, nobody[:, 0:1]], 1)
        stop = torch.cat([self.stop, nobody[:, 1:2]], 1)
        order = None if self.order is None else torch.cat([self.order, nobody[:, 2:3].long()], 1)
        listed = self.started.new_empty(num_lists, 0)
        begun = self.started.new_zeros(num_lists, 1)
        newborn = torch.diff(self.started, prepend=begun).amax(0).tolist()
        for number, width in enumerate(self.widths):
            lo, until = number * self.size, self.started[:, number : number + 1]
            coming = begun + torch.arange(newborn[number], device=begun.device)
            coming = torch.where(coming < until, coming, num_keys)
            listed = _kept(torch.cat([listed, coming], 1), stop, lo, width, num_keys)
            begun = until
            keys = listed if order is None else order.gather(1, listed)
            hi = min(lo + self.size, self.num_queries)
            yield Tile.of(lo, hi, keys, start.gather(1, listed).sub_(lo), stop.gather(1, listed).sub_(lo))


def _kept(listed: Tensor, stop: Tensor, lo: int, width: int, nobody: int) -> Tensor:
    """Of each list the keys that a query from `lo` on meets, in their order, filled up to `width` with `nobody`."""
    alive = stop.gather(1, listed) > lo
    place = torch.where(alive, alive.cumsum(1) - 1, width)
    kept = listed.new_full((listed.shape[0], width + 1), nobody)
    return kept.scatter_(1, place, listed)[:, :width]


def _narrowed(
    start: Tensor, stop: Tensor, examples: slice, heads: slice
) -> tuple[tuple[int, int, int], tuple[Tensor, Tensor]]:
    """The lists of a rectangle: their shape [b or 1, g or 1, r or 1], and start and stop as [L, Nk]."""
    for axis, mine in enumerate((examples, heads)):
        if start.shape[axis] > 1:
            start, stop = (t.narrow(axis, mine.start, mine.stop - mine.start) for t in (start, stop))
    return (start.shape[0], start.shape[1], start.shape[2]), (start.flatten(0, 2), stop.flatten(0, 2))


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


def _rows_at_once(logits_of_a_row: int) -> int:
    return max(1, LOGITS // max(1, logits_of_a_row))


def _rectangles(examples: slice, heads: slice, rows: int) -> Iterator[tuple[slice, slice]]:
    """The rows of a rectangle, cut into rectangles of at most `rows` rows."""
    num_heads = heads.stop - heads.start
    examples_at_once, heads_at_once = max(1, rows // num_heads), min(rows, num_heads)
    for example in range(examples.start, examples.stop, examples_at_once):
        for head in range(heads.start, heads.stop, heads_at_once):
            yield (
                slice(example, min(example + examples_at_once, examples.stop)),
                slice(head, min(head + heads_at_once, heads.stop)),
            )


def _ascending(x: Tensor) -> bool:
    return bool((x[..., 1:] >= x[..., :-1]).all())


def _extent(columns: Tensor) -> tuple[int, int]:
    """[L, W] bool -> the range of columns from the first to the last that is true anywhere."""
    found = columns.any(0).nonzero()
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def _joined(first: tuple[int, int], second: tuple[int, int]) -> tuple[slice, ...]:
    """Two column ranges without the empty ones, joined where they touch."""
    ranges = sorted(r for r in (first, second) if r[1] > r[0])
    if len(ranges) == 2 and ranges[0][1] >= ranges[1][0]:
        ranges = [(ranges[0][0], max(ranges[0][1], ranges[1][1]))]
    return tuple(slice(*r) for r in ranges)
