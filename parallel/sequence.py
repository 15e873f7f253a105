"""Sequence parallelism: adjacent ranks share each row of a batch, every one a slice of its tokens.

`SequenceShard` is what a model is told: which slice it has, and the one collective by which its layers talk, an
all-to-all whose way back is the same all-to-all turned round. It counts the bytes that cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.world import World


class SequenceShard:
    """One rank's slice of rows whose tokens are shared among `lengths`.

    sent, received: bytes that have crossed to and from other ranks, forward and backward, since this was made or they
    were set to 0.
    """

    def __init__(self, world: World, lengths: Sequence[int]) -> None:
        if len(lengths) != world.sequence or min(lengths) < 1:
            raise ValueError(
                f"parallel.sequence: {world.sequence} ranks share a row, each with a token or more; got {list(lengths)}"
            )
        self.rank = world.sequence_rank
        self.lengths = tuple(lengths)
        self.sent = self.received = 0
        self._group, self._calls = world.sequence_group, world.calls

    @property
    def tokens(self) -> slice:
        """Where this rank's tokens stand in the row."""
        first = sum(self.lengths[: self.rank])
        return slice(first, first + self.lengths[self.rank])

    def exchange(self, rows: Tensor, send: Sequence[Tensor], receive: Sequence[int]) -> Tensor:
        """Rows [n, w] to every rank, the ones numbered in `send` (int64, each at most once), and what they send here.

        Returns [sum of receive, w], rank by rank; `receive` says how many come from each. Differentiable in rows: the
        gradients travel back, and those of a row are summed in at least float32, in the order of ranks.
        """
        return _Exchange.apply(rows, self, tuple(send), tuple(receive))

    def _all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        got = rows.new_empty(sum(receive), rows.shape[1])
        self._calls.number += 1
        dist.all_to_all_single(got, rows.contiguous(), list(receive), list(send), group=self._group)
        bytes_of_a_row = rows.shape[1] * rows.element_size()
        self.sent += (sum(send) - send[self.rank]) * bytes_of_a_row
        self.received += (sum(receive) - receive[self.rank]) * bytes_of_a_row
        return got


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, shard: SequenceShard, send: tuple[Tensor, ...], receive: tuple[int, ...]
    ) -> Tensor:
        ctx.shard, ctx.send, ctx.receive = shard, send, receive
        ctx.shape, ctx.dtype = rows.shape, rows.dtype
        wanted = torch.cat([rows.index_select(0, index) for index in send])
        return shard._all_to_all(wanted, [len(index) for index in send], receive)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        counts = [len(index) for index in ctx.send]
        back = ctx.shard._all_to_all(grad, ctx.receive, counts)
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(ctx.dtype, torch.float32))
        # Rank by rank: to no row is added twice at once, so the order of the sum is fixed.
        for index, part in zip(ctx.send, back.split(counts), strict=True):
            total.index_add_(0, index, part.to(total.dtype))
        return total.to(ctx.dtype), None, None, None


def even_lengths(length: int, ranks: int) -> list[int]:
    """`length` tokens among ranks, as evenly as can be, the first ones having one more."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]
