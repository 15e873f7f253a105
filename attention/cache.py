"""The decode cache: the keys that some later query may still meet, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from attention.clock import Clock, Stream
from attention.lifetimes import FOREVER, Lifetimes


def take_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Of rows [B, G, N] or [B, G, N, D] those at `order`, int64 [B, G, n]."""
    index = order if rows.dim() == 3 else order[..., None].expand(*order.shape, rows.shape[3])
    return rows.gather(2, index)


class LivingKeys:
    """Rows of (k, v) with their lifetimes, appended as tokens come and forgotten once nobody can meet them.

    k [B, G, N, D], v [B, G, N, Dv], birth and death int32 [B, G, N]; heads that own fewer living rows than
    others are padded with rows that are never alive. With a `limit` no key outlives that many steps, whatever
    its mixer says.
    """

    def __init__(self, batch: int, device: torch.device, limit: int | None = None) -> None:
        self.limit = limit
        self.stream = Stream(0, torch.zeros(batch, dtype=torch.int64, device=device))
        self.rows: dict[str, Tensor] = {}
        self.size = 0
        self._check_at = 64  # counting the living costs a pass over the rows: amortise it by doubling

    def extend(self, k: Tensor, v: Tensor, life: Lifetimes, clock: Clock) -> tuple[Tensor, Tensor, Lifetimes]:
        """Add the new tokens' keys; returns all that the new queries may meet. Stored without gradient."""
        if self.limit is not None:
            life = life.at_most(self.limit)
        if self.size == 0:
            self._append(k, v, life)
            return k, v, life
        # The documents of earlier tokens end where the first new document begins.
        ended = clock.first_start_B.to(torch.int32)[:, None, None]
        old = {name: rows[:, :, : self.size] for name, rows in self.rows.items()}
        torch.minimum(old["death"], ended, out=old["death"])
        self._append(k, v, life)
        rows = {name: rows[:, :, : self.size] for name, rows in self.rows.items()}
        if not torch.is_grad_enabled():
            return rows["k"], rows["v"], Lifetimes(rows["birth"], rows["death"])
        # Backward will read what it was given, so hand out copies that later tokens do not touch.
        k, v = torch.cat([old["k"], k], 2), torch.cat([old["v"], v], 2)
        return k, v, Lifetimes(rows["birth"].clone(), rows["death"].clone())

    def starts(self, clock: Clock) -> Tensor:
        """[B, G, N] of all rows, asked between `extend` and `advance`: the time at which the row's document began,
        FOREVER for those that no new query may meet."""
        began = self.stream.start_B[:, None].expand(-1, self.size - clock.time.shape[1])
        new = clock.starts.expand(len(began), -1)
        return torch.where(self._alive(), torch.cat([began, new], 1)[:, None], FOREVER)

    def advance(self, clock: Clock) -> None:
        """The new tokens are done: move on, and forget who is dead by then."""
        self.stream = clock.after(len(self.stream.start_B))
        if self.size >= self._check_at:
            self._forget()

    def _append(self, k: Tensor, v: Tensor, life: Lifetimes) -> None:
        batch, heads, new = k.shape[:3]
        birth, death = (t.expand(batch, heads, new) for t in (life.birth, life.death))
        added = {"k": k.detach(), "v": v.detach(), "birth": birth, "death": death}
        if not self.rows:
            self.rows = {name: rows.clone() for name, rows in added.items()}
        else:
            self._reserve(self.size + new)
            for name, rows in added.items():
                self.rows[name][:, :, self.size : self.size + new] = rows
        self.size += new

    def _reserve(self, size: int) -> None:
        capacity = self.rows["k"].shape[2]
        if size <= capacity:
            return
        for name, rows in self.rows.items():
            larger = rows.new_empty(*rows.shape[:2], max(size, 2 * capacity), *rows.shape[3:])
            larger[:, :, : self.size] = rows[:, :, : self.size]
            self.rows[name] = larger

    def _alive(self) -> Tensor:
        return self.rows["death"][:, :, : self.size] > self.stream.now

    def _forget(self) -> None:
        alive = self._alive()
        count = alive.sum(2, keepdim=True)
        most = int(count.max())
        if 2 * most < self.size:
            order = (~alive).to(torch.int8).argsort(dim=2, stable=True)[:, :, :most]
            padding = torch.arange(most, device=order.device) >= count
            for name, rows in self.rows.items():
                self.rows[name] = take_rows(rows[:, :, : self.size], order)
            self.rows["birth"].masked_fill_(padding, FOREVER)
            self.rows["death"].masked_fill_(padding, 0)
            self.size = most
        self._check_at = max(64, 2 * self.size)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values of the living rows, over all sequences."""
        if not self.rows:
            return 0
        per_row = sum(self.rows[name].shape[3] * self.rows[name].element_size() for name in ("k", "v"))
        return int(self._alive().sum()) * per_row

    @property
    def capacity(self) -> int:
        """Bytes allocated for keys and values, padding included."""
        return sum(self.rows[name].nbytes for name in ("k", "v") if self.rows)
