"""The decode cache of a mixer that meets the last members of a cluster: a ring of rows for each of them.

Legend of shapes: B batch, H heads, C clusters, S rows of a ring, T new tokens, D and Dv widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.clock import Clock, Stream
from attention.lifetimes import FOREVER, Lifetimes


class Rows(NamedTuple):
    """Keys and values of a cache: k [B, H, N, D], v [B, H, N, Dv], and int64 broadcast to [B, H, N] their clusters,
    their times, and when their documents began: FOREVER for rows that nobody may meet."""

    k: Tensor
    v: Tensor
    cluster: Tensor
    time: Tensor
    start: Tensor


class ClusterRings:
    """The last S members of each cluster; the next one takes the place of the oldest.

    With a `limit` no key outlives that many steps.
    """

    def __init__(
        self, batch: int, heads: int, clusters: int, size: int, device: torch.device, limit: int | None = None
    ) -> None:
        self.stream = Stream(0, torch.zeros(batch, dtype=torch.int64, device=device))
        self.limit = limit
        self.size = size
        self.members = torch.zeros(batch, heads, clusters, dtype=torch.int64, device=device)  # so far, of each ring
        self.time = torch.full((batch, heads, clusters, size), -1, dtype=torch.int32, device=device)
        self.rows: tuple[Tensor, Tensor] | None = None  # k [B, H, C, S, D] and v, once their widths are known

    def all(self) -> Rows | None:
        """The rows of all rings, in each ring by age; None before the first token."""
        if self.rows is None:
            return None
        batch, heads, clusters = self.members.shape
        place = torch.arange(self.size, device=self.time.device)
        oldest_first = (self.members[..., None] + place) % max(self.size, 1)
        k, v = (x.take_along_dim(oldest_first[..., None], 3).flatten(2, 3) for x in self.rows)
        time = self.time.take_along_dim(oldest_first, 3).flatten(2).long()
        start = torch.where(self._alive(time), self.stream.start_B[:, None, None], FOREVER)
        cluster = torch.arange(clusters, device=time.device).repeat_interleave(self.size)
        return Rows(k, v, cluster.expand(batch, heads, -1), time, start)

    def one(self, cluster: Tensor, clock: Clock) -> tuple[Tensor, Tensor, Lifetimes] | None:
        """The rows k, v [B, H, S, ..] of one ring of each head, [B, H], for a single new token, which comes at time 0;
        None before the first token."""
        if self.rows is None:
            return None
        ring = cluster[..., None, None]
        k, v = (x.take_along_dim(ring[..., None], 2).squeeze(2) for x in self.rows)
        time = self.time.take_along_dim(ring, 2).squeeze(2)
        met = self._alive(time) & (time >= clock.starts[:, None])
        birth = torch.where(met, 0, FOREVER).to(torch.int32)
        return k, v, Lifetimes(birth, torch.full_like(birth, FOREVER))

    def extend(self, k: Tensor, v: Tensor, cluster: Tensor, clock: Clock) -> None:
        """The new tokens are done: keep k [B, H, T, D] and v of those that are among the last of their cluster
        [B, H, T]. Stored without gradient."""
        if self.rows is None:
            room = (*self.members.shape, self.size)
            self.rows = k.new_zeros(*room, k.shape[-1]), v.new_zeros(*room, v.shape[-1])
        if self.size:
            self._write(k.detach(), v.detach(), cluster, clock.time.to(torch.int32))
        self.stream = clock.after(len(self.members))

    def _write(self, k: Tensor, v: Tensor, cluster: Tensor, time: Tensor) -> None:
        assert self.rows is not None
        assigned = F.one_hot(cluster, self.members.shape[2])
        new = assigned.sum(2)
        number = (assigned.cumsum(2) * assigned).sum(-1) - 1  # of each token among the new ones of its cluster
        last = number >= new.gather(2, cluster) - self.size
        place = (self.members.gather(2, cluster) + number) % self.size
        self.members += new
        b, h, t = last.nonzero(as_tuple=True)
        here = b, h, cluster[b, h, t], place[b, h, t]
        self.rows[0][here], self.rows[1][here] = k[b, h, t], v[b, h, t]
        self.time[here] = time[0, t]

    def _alive(self, time: Tensor) -> Tensor:
        """Of rows [B, H, ..] by their times: whether the next token may meet them, if it goes on with the document."""
        first = self.stream.start_B
        if self.limit is not None:
            first = first.clamp(min=self.stream.now - self.limit + 1)
        return time >= first.view(-1, *[1] * (time.dim() - 1))

    @property
    def bytes(self) -> int:
        """Bytes of the living rows, over all sequences: keys, values and times."""
        return 0 if self.rows is None else int(self._alive(self.time).sum()) * self._bytes_per_row()

    @property
    def capacity(self) -> int:
        """Bytes allocated for rows, empty places included."""
        return 0 if self.rows is None else self.time.numel() * self._bytes_per_row()

    def _bytes_per_row(self) -> int:
        assert self.rows is not None
        return sum(x.shape[-1] * x.element_size() for x in self.rows) + self.time.element_size()
