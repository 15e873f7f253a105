"""Spans: the blocks of a grid drawn on positions, and what pools their tokens.

Legend of shapes: B batch, G key heads, R tokens, L tokens of a block, N = R // L blocks, n some of them, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.clock import Clock
from attention.lifetimes import FOREVER, Lifetimes
from attention.ops.attend import attend


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of L tokens among R tokens.

    Of any L neighbours exactly one has a number that is L - 1 mod L. So block i is the one that contains token
    i L + L - 1: these N = R // L are all that can be whole, however the documents are packed.

    length    L
    first     int64 [B or 1, N], number of a block's first token; None: it is i L
    whole     bool [B or 1, N]: all of its tokens are here, and of one document
    last      int64 [B or 1, N], position of its last token
    born      int64 [B or 1, N], the time right behind its last token
    end       int64 [B or 1, N], when its document ends, FOREVER while unknown
    """

    length: int
    first: Tensor | None
    whole: Tensor
    last: Tensor
    born: Tensor
    end: Tensor

    @staticmethod
    def of(clock: Clock, length: int) -> Blocks:
        """The blocks of `length` tokens among those of the clock, of which positions below 0 belong to nobody."""
        count = clock.time.shape[1]
        anchor = length - 1 + length * torch.arange(count // length, device=clock.time.device)
        position = clock.position[:, anchor]
        end = torch.full_like(position, FOREVER) if clock.end is None else clock.end[:, anchor]
        first = anchor - position % length
        born = clock.now + first + length
        whole = (position >= 0) & (first + length <= count) & (born <= end)
        last = position + (first + length - 1 - anchor)
        one_document = clock.position is clock.time  # from its beginning: the blocks lie side by side
        return Blocks(length, None if one_document else first, whole, last, born, end)

    def tokens(self, x: Tensor, which: slice = slice(None), unit: int = 1) -> Tensor:
        """The vectors of the blocks `which`, [B, G, n, L / unit, C], from x [B, G, R // unit, C].

        x holds one vector per token, or per block of `unit` tokens. A block that is not whole gets those of anybody.
        """
        here = self.length // unit
        if self.first is None:
            number = self.whole.shape[1]
            return x[:, :, : number * here].unflatten(2, (number, here))[:, :, which]
        batch, slots = x.shape[0], x.shape[2]
        index = self.first[:, which, None] // unit + torch.arange(here, device=x.device)
        row = torch.arange(0, batch * slots, slots, device=x.device)[:, None, None]
        index = index.clamp(0, slots - 1) + row
        by_token = x.transpose(1, 2).flatten(0, 1).index_select(0, index.flatten())
        return by_token.unflatten(0, index.shape).movedim(3, 1)


def largest(x: Tensor) -> Tensor:
    """[B, G, n, L, C] -> [B, G, n, C]: the maximum over each span, per channel. Equal ones share the gradient."""
    return x.amax(3)


def averaged(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values of each span, v [B, G, n, L, C], averaged by the attention of its one query [B, G, n, D] to its keys
    k [B, G, n, L, D]: [B, G, n, C]."""
    batch, number = query.shape[0], query.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query[:, :, :, None], k, v))
    always = torch.tensor([0, FOREVER], dtype=torch.int32, device=q.device)
    out, _ = attend(q, k, v, Lifetimes(always[:1], always[1:]))
    return out.squeeze(2).unflatten(0, (batch, number)).transpose(1, 2)


def block_end(clock: Clock, length: int) -> Tensor:
    """int64 [B or 1, 1, T]: when each token's block ends; 0 where its document is over (position below 0)."""
    end = clock.time + length - clock.position % length
    return end.masked_fill(clock.position < 0, 0)[:, None]


def with_earlier(clock: Clock, count: int) -> Clock:
    """The clock of the `count` tokens before, and of those of `clock`. Positions below 0: a document that is over."""
    if count == 0:
        return clock
    back = torch.arange(-count, 0, device=clock.time.device)[None]
    time = torch.cat([clock.now + back, clock.time], 1)
    position = torch.cat([clock.position[:, :1] + back, clock.position], 1)
    end = clock.end
    if end is not None:
        end = torch.cat([end[:, :1].expand(-1, count), end], 1)
    return Clock(clock.now - count, time, position, end)
