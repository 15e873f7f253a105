"""The decode cache of mixers that make keys of whole spans: the keys made, and the tokens of spans not yet complete."""

from __future__ import annotations

import torch
from torch import Tensor

from attention.cache import LivingKeys
from attention.clock import Clock


class Tail:
    """Named tensors [B, heads, n, width] of the last n tokens, the same times in all rows of the batch.

    Stored without gradient, in buffers that a stream moves through: a token costs the same, however many are kept.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.begin = self.size = 0

    def before(self, new: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """The last `count` tokens kept, and the new ones behind them."""
        if count == 0:
            return new
        stop = self.begin + self.size
        return {name: torch.cat([self.buffers[name][:, :, stop - count : stop], x], 2) for name, x in new.items()}

    def push(self, new: dict[str, Tensor], keep: int) -> None:
        """Add new tokens, and forget all but the last `keep` of those there are."""
        length = next(iter(new.values())).shape[2]
        added = min(length, keep)
        kept = min(self.size, keep - added)
        begin, size = self.begin + self.size - kept, kept + added
        if not self.buffers or begin + size > next(iter(self.buffers.values())).shape[2]:
            self.buffers = {name: self._moved(name, x, slice(begin, begin + kept), 2 * size) for name, x in new.items()}
            begin = 0
        for name, x in new.items():
            self.buffers[name][:, :, begin + kept : begin + size] = x[:, :, length - added :].detach()
        self.begin, self.size = begin, size

    def _moved(self, name: str, like: Tensor, kept: slice, capacity: int) -> Tensor:
        buffer = like.new_empty(*like.shape[:2], capacity, like.shape[3])
        if kept.stop > kept.start:
            buffer[:, :, : kept.stop - kept.start] = self.buffers[name][:, :, kept]
        return buffer

    @property
    def bytes_of_a_token(self) -> int:
        """Bytes of one token, in one row of the batch."""
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in self.buffers.values())

    @property
    def capacity(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.buffers.values())


class SpanState(LivingKeys):
    """Living keys that were made of spans; and those last tokens that further ones will be made of.

    kept_B     how many these are in each row; a tail is as long as the most
    peak       [B, G, 1, D]: the largest query of the open block, where it stands for those of its tokens; or None
    """

    def __init__(self, batch: int, device: torch.device, limit: int | None = None) -> None:
        super().__init__(batch, device, limit)
        self.tail = Tail()
        self.kept_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.peak: Tensor | None = None

    def keep(self, new: dict[str, Tensor], wanted_B: Tensor, clock: Clock) -> None:
        """The new tokens are done: move on with the last wanted_B [B or 1] tokens of each row, or with all."""
        seen = self.tail.size + clock.time.shape[1]
        self.kept_B = wanted_B.clamp(max=seen).expand(len(self.kept_B))
        self.tail.push(new, int(self.kept_B.max()))
        self.advance(clock)

    @property
    def bytes(self) -> int:
        """Bytes of what is kept, over all sequences."""
        peaks = 0 if self.peak is None else self.peak[0].nbytes * int((self.kept_B > 0).sum())
        return super().bytes + self.tail.bytes_of_a_token * int(self.kept_B.sum()) + peaks

    @property
    def capacity(self) -> int:
        """Bytes allocated, padding included."""
        return super().capacity + self.tail.capacity + (0 if self.peak is None else self.peak.nbytes)
