"""Keys with lifetimes: which keys each query may meet, for every mixer in one form.

A key is born at one time and dies at a later one or never; the query at time t meets exactly the keys with
`birth <= t < death`. Time is any order in which the keys of a query form an interval: positions, ranks in a lane.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FOREVER = 2**31 - 1
"""The death of a key that never dies, the birth of one that never lives, the time of a padding query."""


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """When each key is born and dies.

    birth, death   int32, broadcastable to [B, G, Nk], in the unit of the queries' time; death <= birth: never alive
    generation     int32, broadcastable to [B, G, Nk]: keys of a kind that live about equally long. It only sorts
                   the work of the kernels, never changes a result.

    The tensors are not to be modified in place: what `attend` learns from them is remembered.
    Raises ValueError where one of them is no int32 tensor.
    """

    birth: Tensor
    death: Tensor
    generation: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("birth", "death", "generation"):
            value = getattr(self, name)
            if value is None and name == "generation":
                continue
            if not isinstance(value, Tensor) or value.dtype != torch.int32:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: expected an int32 tensor broadcastable to [B, G, Nk], got {got}")

    def alive(self, time: Tensor) -> Tensor:
        """Mask [..., Nq, Nk] of the keys that the queries at `time` [..., Nq] meet. Nq x Nk elements: mind the size."""
        now = time[..., None]
        return (self.birth[..., None, :] <= now) & (now < self.death[..., None, :])

    def until(self, end: Tensor) -> "Lifetimes":
        """The same keys, none of which outlives `end` (int32, broadcastable to death): its document, its lane."""
        return Lifetimes(self.birth, torch.minimum(self.death, end), self.generation)


def causal(num_keys: int, device: torch.device | str | None = None) -> Lifetimes:
    """Tokens 0..num_keys-1 that live forever: dense causal attention."""
    birth = torch.arange(num_keys, dtype=torch.int32, device=device)
    return Lifetimes(birth, torch.full_like(birth, FOREVER))


def window(num_keys: int, width: int, device: torch.device | str | None = None) -> Lifetimes:
    """Tokens that live for `width` steps, their own included: a sliding window."""
    birth = torch.arange(num_keys, dtype=torch.int32, device=device)
    return Lifetimes(birth, (birth.long() + width).clamp(max=FOREVER).int())


def living_pairs(
    life: Lifetimes,
    time: Tensor | None,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    num_queries: int,
    num_keys: int,
) -> int:
    """Number of (query, living key) pairs, summed over batch and query heads: the work of one `attend`.

    time: int32, ascending, broadcastable to [B, H, Nq]; None = 0..Nq-1. Counted by sorted searches, never pair by pair.
    """
    group = heads // kv_heads
    birth, death = _four(life.birth, kv_heads), _four(torch.maximum(life.birth, life.death), kv_heads)
    if time is None:
        counts = death.clamp(0, num_queries).long() - birth.clamp(0, num_queries).long()
    else:
        # Axes: batch, key head, query head of the group, item. A query at FOREVER stands behind every death.
        now = _four(time, kv_heads)
        rows = torch.broadcast_shapes(now.shape[:3], birth.shape[:3], death.shape[:3])
        now = now.expand(*rows, num_queries).contiguous()
        born, dead = (
            torch.searchsorted(now, x.expand(*rows, num_keys).contiguous().to(now.dtype))
            for x in (birth, death)
        )
        counts = dead - born
    return int(counts.expand(batch, kv_heads, group, num_keys).sum())


def _four(x: Tensor, kv_heads: int) -> Tensor:
    """`x`, broadcastable to [B, G or H, n], as [B or 1, G or 1, r or 1, n]."""
    x = x.reshape((1,) * (3 - x.dim()) + tuple(x.shape))
    heads = x.shape[1]
    return x.unsqueeze(2) if heads in (1, kv_heads) else x.unflatten(1, (kv_heads, heads // kv_heads))
