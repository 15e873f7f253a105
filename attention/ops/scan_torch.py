"""`diagonal_scan` in torch: products of matrices inside chunks, one step per chunk between them.

A chunk of L tokens that begins with the state h_0 ends with q^L h_0 + sum_j q^(L-1-j) b x_j, and its outputs are
y_i = sum_{j <= i} k_{i-j} x_j + sum_n c q^(i+1) h_0, k_t = sum_n b c q^t: three products, in which later tokens are
multiplied by exact zeros. Where documents begin inside a chunk, each piece of it that lies in one document takes part
as a chunk of its own, with zeros in place of the other tokens.

Legend of shapes: B batch, T tokens, C channels, N numbers that a channel remembers, L tokens of a chunk, M chunks,
P pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens: inside, work grows with their square; between, each chunk costs a call or two
SHORTEST = 4
AT_ONCE = 2**20  # numbers of x that are turned to channels first: 4 MiB of float32, which stay in a cache
FEWEST = 64  # chunks, over the batch: products of fewer rows are slow


def scan_forward(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, C] and h [B, C, N] of `diagonal_scan`; all but x in one type, that of the results."""
    y, h = torch.empty_like(x, dtype=b.dtype, memory_format=torch.contiguous_format), h0
    for part, tables in _parts(x, log_decay, b, c, reset):
        rows = part.rows(x, b.dtype)
        starts = part.states(rows, h, tables)
        h = starts[-1]
        out = part.join(torch.bmm(part.split(rows), tables.inside))
        carried = torch.bmm(part.by_channel(starts[:-1]), tables.out)
        y[:, part.where] = part.tokens(out.add_(part.only(carried, part.first)))
    return y, h.clone()


def scan_backward(
    dy: Tensor, dh: Tensor, x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay, b, c and h0, from those of y and h. States are computed again, one per chunk."""
    dx = torch.empty_like(x, dtype=b.dtype, memory_format=torch.contiguous_format)
    done, h = [], h0
    for part, tables in _parts(x, log_decay, b, c, reset):
        states = part.states(part.rows(x, b.dtype), h, tables)
        done.append((part, tables, states))
        h = states[-1]
    of_tables: dict[Tables, list[Tensor]] = {}
    for part, tables, states in reversed(done):
        rows, drows = part.rows(x, b.dtype), part.rows(dy, b.dtype)
        from_start, into_end = part.only(drows, part.first), part.only(rows, part.last)
        dstates = part.adjoints(torch.bmm(from_start, tables.out.mT), dh, tables)
        dh, dends, starts = dstates[0], part.by_channel(dstates[1:]), part.by_channel(states[:-1])
        pieces, dpieces = part.split(rows), part.split(drows)
        drow = part.join(torch.bmm(dpieces, tables.inside.mT))
        drow = drow.add_(part.only(torch.bmm(dends, tables.into.mT), part.last))
        dx[:, part.where] = part.tokens(drow)

        decayed = states[:-1] * dstates[1:]
        found = [
            torch.bmm(pieces.mT, dpieces),
            torch.bmm(into_end.mT, dends),
            torch.bmm(starts.mT, from_start),
            (decayed if part.keep is None else decayed * part.keep).sum((0, 1)),
        ]
        sums = of_tables.setdefault(tables, found)
        if sums is not found:
            for total, more in zip(sums, found, strict=True):
                total.add_(more)
    dlog_decay, db, dc = (torch.zeros_like(t) for t in (log_decay, b, c))
    for tables, sums in of_tables.items():
        for total, more in zip((dlog_decay, db, dc), tables.gradients(*sums), strict=True):
            total.add_(more)
    return dx, dlog_decay, db, dc, dh.clone()


@dataclass(frozen=True, eq=False)
class Tables:
    """The matrices of a chunk, from powers q^0..q^L [C, N, L + 1]: token to output inside [C, L, L], token to the state
    at the end, into [C, L, N], state at the start to output, out [C, N, L], and start to end, decay [C, N]."""

    powers: Tensor
    b: Tensor
    c: Tensor
    inside: Tensor
    into: Tensor
    out: Tensor
    decay: Tensor

    @staticmethod
    def of(log_decay: Tensor, b: Tensor, c: Tensor, length: int) -> Tables:
        """For chunks of `length` tokens."""
        step = torch.arange(1, length + 1, dtype=b.dtype, device=b.device)
        # q^0 by hand: a decay of 0 is a logarithm of -inf, and that times 0 no number.
        powers = F.pad((log_decay[..., None] * step).exp(), (1, 0), value=1.0)
        taps = torch.einsum("cn,cnt->ct", b * c, powers[..., :-1])
        inside = F.pad(taps, (length - 1, 0)).unfold(1, length, 1).flip(1)  # (j, i): the tap i - j, 0 before 0
        into = (b[..., None] * powers[..., :-1]).flip(2).mT.contiguous()
        return Tables(powers, b, c, inside, into, c[..., None] * powers[..., 1:], powers[..., -1])

    def gradients(self, dinside: Tensor, dinto: Tensor, dout: Tensor, ddecay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of log_decay, b, c [C, N], from those of the four matrices."""
        length = dinside.shape[1]
        skewed = F.pad(dinside.flip(1), (0, length)).flatten(1)[:, :-length].unflatten(1, (length, -1))
        dtaps = skewed.sum(1)[:, None, length - 1 :]  # sums along diagonals
        dinto = dinto.mT.flip(2)
        early, late = self.powers[..., :-1], self.powers[..., 1:]
        b, c = self.b[..., None], self.c[..., None]
        db = ((dtaps * c + dinto) * early).sum(-1)
        dc = (dtaps * b * early + dout * late).sum(-1)
        dpowers = F.pad(dtaps * b * c + dinto * b, (0, 1)) + F.pad(dout * c, (1, 0))
        dpowers[..., -1] += ddecay
        step = torch.arange(length + 1, dtype=b.dtype, device=b.device)
        return (step * self.powers * dpowers).sum(-1), db, dc


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens `where` of all rows, in whole chunks of `length`.

    first, last [B M, L]: tokens that see the state at the start of their chunk, and that the state at its end has seen;
    keep [M, B, 1, 1]: the start is seen by the end. None where all are, and no document begins.
    chunk [P], mine [P, L], piece [B M, L]: of each piece its chunk and which tokens it has, of each token its piece.
    None where chunks are whole.
    """

    where: slice
    length: int
    batch: int
    first: Tensor | None = None
    last: Tensor | None = None
    keep: Tensor | None = None
    chunk: Tensor | None = None
    mine: Tensor | None = None
    piece: Tensor | None = None

    @staticmethod
    def of(where: slice, length: int, batch: int, reset: Tensor | None) -> Part:
        """With the pieces that follow from where documents begin."""
        if reset is None:
            return Part(where, length, batch)
        document = reset[:, where].unflatten(1, (-1, length)).cumsum(2)
        keep = (document[..., -1] == 0).mT[..., None, None]
        document = document.flatten(0, 1)
        number = document - document[:, :1]
        pieces = number[:, -1] + 1
        piece = number + (pieces.cumsum(0) - pieces)[:, None]
        chunk = torch.repeat_interleave(torch.arange(len(pieces), device=pieces.device), pieces)
        mine = piece[chunk] == torch.arange(len(chunk), device=chunk.device)[:, None]
        first, last = document == 0, number == number[:, -1:]
        if len(chunk) == len(pieces):
            return Part(where, length, batch, first, None, keep)
        return Part(where, length, batch, first, last, keep, chunk, mine, piece)

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [B, T, C] -> [C, B M, L]."""
        return x[:, self.where].to(dtype).permute(2, 0, 1).reshape(x.shape[2], -1, self.length)

    def tokens(self, rows: Tensor) -> Tensor:
        """The reverse of `rows`, for all of this part."""
        return rows.view(rows.shape[0], self.batch, -1).permute(1, 2, 0)

    def split(self, rows: Tensor) -> Tensor:
        """[C, B M, L] -> [C, P, L]: each piece with zeros around it."""
        if self.chunk is None or self.mine is None:
            return rows
        return rows.index_select(1, self.chunk).masked_fill_(~self.mine, 0.0)

    def join(self, pieces: Tensor) -> Tensor:
        """[C, P, L] -> [C, B M, L]: each token from its piece."""
        return pieces if self.piece is None else pieces.gather(1, self.piece.expand(len(pieces), -1, -1))

    def only(self, rows: Tensor, which: Tensor | None) -> Tensor:
        """Zeros for all tokens but `which` [B M, L]."""
        return rows if which is None else rows.masked_fill(~which, 0.0)

    def states(self, rows: Tensor, h: Tensor, tables: Tables) -> Tensor:
        """[M + 1, B, C, N]: the state before each chunk and behind the last, from h [B, C, N]."""
        added = self.by_chunk(torch.bmm(self.only(rows, self.last), tables.into))
        return _steps(added, h, tables.decay, self.keep)

    def adjoints(self, added: Tensor, dh: Tensor, tables: Tables) -> Tensor:
        """[M + 1, B, C, N]: gradients of `states`, from those that chunks add to their starts [C, B M, N] and dh."""
        keep = None if self.keep is None else self.keep.flip(0)
        return _steps(self.by_chunk(added).flip(0), dh, tables.decay, keep).flip(0)

    def by_chunk(self, states: Tensor) -> Tensor:
        """[C, B M, N] -> [M, B, C, N]."""
        return states.unflatten(1, (self.batch, -1)).permute(2, 1, 0, 3)

    def by_channel(self, states: Tensor) -> Tensor:
        """The reverse of `by_chunk`."""
        return states.permute(2, 1, 0, 3).flatten(1, 2)


def _parts(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, reset: Tensor | None) -> Iterator[tuple[Part, Tables]]:
    """All tokens, so many whole chunks at a time that they stay in a cache; then the rest as a shorter chunk."""
    batch, total, channels = x.shape
    length = _chunk_length(reset)
    whole = total - total % length
    at_once = max(AT_ONCE // max(1, batch * channels * length), FEWEST // max(1, batch), 1) * length
    if whole:
        tables = Tables.of(log_decay, b, c, length)
        for begin in range(0, whole, at_once):
            yield Part.of(slice(begin, min(begin + at_once, whole)), length, batch, reset), tables
    if whole < total:
        rest = total - whole
        yield Part.of(slice(whole, total), rest, batch, reset), Tables.of(log_decay, b, c, rest)


def _chunk_length(reset: Tensor | None) -> int:
    """Shorter where documents are so short that pieces would take many times the room of their tokens."""
    length = CHUNK
    if reset is not None:
        begun = int(reset.sum())
        while length > SHORTEST and begun * length > 2 * reset.numel():
            length //= 2
    return length


def _steps(added: Tensor, h: Tensor, decay: Tensor, keep: Tensor | None) -> Tensor:
    """[M + 1, B, C, N]: h, and h <- decay h + added after each step; h counts as 0 in steps that do not keep it."""
    states = added.new_empty(len(added) + 1, *h.shape)
    states[0] = h
    decays = [decay] * len(added) if keep is None else (keep * decay).unbind()
    steps = zip(added.contiguous().unbind(), decays, states[:-1].unbind(), states[1:].unbind(), strict=True)
    for new, kept, before, behind in steps:
        torch.addcmul(new, kept, before, out=behind)
    return states
