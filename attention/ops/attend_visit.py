"""How the tile loop of `attend` reads and writes: rows of a part, and one visit of a tile to its keys.

Legend of shapes: H query heads, G key heads, r = H / G, Nq queries, Nk keys; b, g the examples and key heads of a
part; m queries and W keys of a tile; R rows of a product, with M queries each. A row is a key head with the
queries of its r heads (M = r m); or, where every query head has a list of keys of its own, one query head (M = m);
or, where tiles are folded, one tile of a single key head (R = count).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.ops.attend_operands import Operands
from attention.ops.attend_plan import Part, Tile


class Rows:
    """The operands of a part: keys as [b g, Nk, ...], queries as views [b, g, r, Nq, ...]."""

    def __init__(self, x: Operands, part: Part) -> None:
        self.part, self.wide = part, x.wide
        self.group = x.q.shape[1] // x.k.shape[1]
        self.q = self.of_queries(x.q)
        self.tau = None if x.tau is None else self.of_queries(x.tau)
        self.k, self.v = self._of_keys(x.k), self._of_keys(x.v)
        self.bias = None if x.bias is None else self._of_keys(x.bias)
        self.u = None if x.u is None else self._of_keys(x.u)

    def of_queries(self, t: Tensor) -> Tensor:
        """[B, H, Nq, ...] -> a view of this part, [b, g, r, Nq, ...]."""
        return t.unflatten(1, (-1, self.group))[self.part.examples, self.part.heads]

    def _of_keys(self, t: Tensor) -> Tensor:
        """[B, G, Nk, ...] -> [b g, Nk, ...]; where keys are listed, an empty row behind them stands for "no key"."""
        t = t[self.part.examples, self.part.heads].to(self.wide).flatten(0, 1)
        return torch.cat([t, t.new_zeros(t.shape[0], 1, *t.shape[2:])], 1) if self.part.listed else t

    def write_keys(self, target: Tensor, grad: Tensor) -> None:
        """The reverse of `_of_keys`, into the part's place in `target`."""
        mine = target[self.part.examples, self.part.heads]
        mine.copy_(grad[:, : mine.shape[2]].unflatten(0, mine.shape[:2]))

    def visit(self, tile: Tile) -> "Visit":
        if isinstance(tile.keys, Tensor):
            return ListVisit(self, tile, tile.keys)
        return FoldVisit(self, tile, tile.keys) if tile.count > 1 else SliceVisit(self, tile, tile.keys)


class Visit:
    """One tile of a part: reads and writes in the shapes of the products, [R, M, ...] and [R, W, ...]."""

    def __init__(self, rows: Rows, tile: Tile) -> None:
        self.rows, self.tile, self.size = rows, tile, (tile.hi - tile.lo) // tile.count
        self.grid: Sequence[int] = (*rows.q.shape[:3], self.size)  # how R and M are made up
        self.lists: Sequence[int] = rows.part.lists  # how the intervals lie in the grid

    def queries(self, t: Tensor) -> Tensor:
        """[b, g, r, Nq, ...] -> [R, M, ...]."""
        return self._tile_of(t).to(self.rows.wide).reshape(self.num_rows, -1, *t.shape[4:])

    def write(self, target: Tensor, values: Tensor) -> None:
        """[R, M, ...] into its place in [b, g, r, Nq, ...]."""
        self._tile_of(target).copy_(values.view(*self.grid, *values.shape[2:]))

    def _tile_of(self, t: Tensor) -> Tensor:
        """[b, g, r, Nq, ...] -> a view [*grid, ...]."""
        return t[:, :, :, self.tile.lo : self.tile.hi]

    @property
    def num_rows(self) -> int:
        raise NotImplementedError

    def keys(self, t: Tensor) -> Tensor:
        """[b g, Nk, ...] -> [R, W, ...]."""
        raise NotImplementedError

    def add(self, total: Tensor, values: Tensor) -> None:
        """[R, W, ...] on top of its keys in [b g, Nk, ...]; in a fixed order, so the same in every run."""
        raise NotImplementedError

    def mask(self, logits: Tensor) -> None:
        """-inf into the logits [R, M, W] of queries and keys that do not meet."""
        for columns in self.tile.masked:
            logits.view(*self.grid, -1)[..., columns] += self._met(columns).reciprocal_().neg_().add_(1.0)

    def silence(self, share: Tensor) -> None:
        """0 into the shares [R, M, W] of queries and keys that do not meet."""
        for columns in self.tile.masked:
            share.view(*self.grid, -1)[..., columns] *= self._met(columns)

    def _met(self, columns: slice) -> Tensor:
        """[*lists, m, columns]: 1 where query and key meet, else 0. In floats, that is 5 times as fast."""
        number = torch.arange(self.size, dtype=self.rows.wide, device=self.tile.start.device)[:, None]
        start, stop = (
            t[..., columns].clamp(0, self.size).to(self.rows.wide).view(*self.lists, 1, -1)
            for t in (self.tile.start, self.tile.stop)
        )
        return torch.minimum(stop - number, (number + 1) - start).clamp_(0.0, 1.0)


class SliceVisit(Visit):
    """Keys that lie side by side."""

    def __init__(self, rows: Rows, tile: Tile, first: int) -> None:
        super().__init__(rows, tile)
        self.columns = slice(first, first + tile.width)

    @property
    def num_rows(self) -> int:
        return self.rows.k.shape[0]

    def keys(self, t: Tensor) -> Tensor:
        return t[:, self.columns]

    def add(self, total: Tensor, values: Tensor) -> None:
        total[:, self.columns] += values


class FoldVisit(Visit):
    """Tiles of one key head whose keys are windows, each `size` keys on from the last."""

    def __init__(self, rows: Rows, tile: Tile, first: int) -> None:
        super().__init__(rows, tile)
        self.first = first
        self.grid = (tile.count, rows.group, self.size)
        self.lists = (tile.start.shape[0], 1)

    @property
    def num_rows(self) -> int:
        return self.tile.count

    def _tile_of(self, t: Tensor) -> Tensor:
        mine = t[0, 0, :, self.tile.lo : self.tile.hi]
        return mine.unflatten(1, (self.tile.count, self.size)).transpose(0, 1)

    def keys(self, t: Tensor) -> Tensor:
        end = self.first + self.tile.width + (self.tile.count - 1) * self.size
        windows = t[0, self.first : end].unfold(0, self.tile.width, self.size)
        return windows.movedim(-1, 1)

    def add(self, total: Tensor, values: Tensor) -> None:
        # Windows overlap; of equal stretches of all windows no two do.
        for begin in range(0, self.tile.width, self.size):
            first = self.first + begin
            places = total[0, first : first + self.tile.count * self.size]
            places.unflatten(0, (self.tile.count, self.size)).add_(values[:, begin : begin + self.size])


class ListVisit(Visit):
    """Keys by index lists, gathered and scattered."""

    def __init__(self, rows: Rows, tile: Tile, lists: Tensor) -> None:
        super().__init__(rows, tile)
        kv_rows, slots = rows.k.shape[:2]
        begin = torch.arange(0, kv_rows * slots, slots, device=lists.device).view(*rows.q.shape[:2], 1, 1)
        # [b g, r or 1, W] into the rows laid end to end
        self.index = (begin + lists.view(*rows.part.lists, -1)).flatten(0, 1)

    @property
    def num_rows(self) -> int:
        return self.index.shape[0] * self.index.shape[1]

    def keys(self, t: Tensor) -> Tensor:
        listed = t.flatten(0, 1).index_select(0, self.index.flatten())
        return listed.view(self.num_rows, -1, *t.shape[2:])

    def add(self, total: Tensor, values: Tensor) -> None:
        total, values = total.flatten(0, 1), values.view(*self.index.shape, *values.shape[2:])
        # Within one list no key stands twice (but "no key", which collects zeros): a copy is an addition.
        for own in range(self.index.shape[1]):
            place = self.index[:, own].flatten()
            total.index_copy_(0, place, total.index_select(0, place).add_(values[:, own].flatten(0, 1)))
