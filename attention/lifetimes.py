"""Keys with lifetimes: which keys each query may meet, for every mixer in one form.

A key is born at one time and dies at a later one or never; the query at time t meets exactly the keys with
`birth <= t < death`. Time is any order in which the keys of a query form an interval: positions, ranks in a
lane.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FOREVER = 2**31 - 1
"""The death of a key that never dies, the birth of one that never lives, the time of a padding query."""


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """When each key is born and dies.

    birth, death   int32, broadcastable to [B, G, Nk], in the unit of the queries' time; death <= birth: the
                   key is never alive
    generation     int32, broadcastable to [B, G, Nk]: keys of a kind that live about equally long. It only sorts
                   the work of a kernel, never changes a result.

    Raises ValueError where one of them is no int32 tensor.
    """

    birth: Tensor
    death: Tensor
    generation: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("birth", self.birth), ("death", self.death), ("generation", self.generation)):
            if value is None and name == "generation":
                continue
            if not isinstance(value, Tensor) or value.dtype != torch.int32:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: expected an int32 tensor broadcastable to [B, G, Nk], got {got}")

    def alive(self, time: Tensor) -> Tensor:
        """Mask [..., Nq, Nk] of the keys that the queries at `time` [..., Nq] meet: quadratic, for small sizes."""
        now = time[..., None]
        return (self.birth[..., None, :] <= now) & (now < self.death[..., None, :])

    def until(self, end: Tensor) -> "Lifetimes":
        """The same keys, none of which outlives `end` (int32, broadcastable): its document, its lane."""
        return Lifetimes(self.birth, torch.minimum(self.death, end), self.generation)

    def at_most(self, steps: int) -> "Lifetimes":
        """The same keys, none of which lives for more than so many steps, its own included."""
        return self.until((self.birth.long() + steps).clamp(max=FOREVER).to(torch.int32))


def causal(num_keys: int, device: torch.device | str | None = None) -> Lifetimes:
    """Tokens 0..num_keys-1 that live forever: dense causal attention."""
    birth = torch.arange(num_keys, dtype=torch.int32, device=device)
    return Lifetimes(birth, torch.full_like(birth, FOREVER))


def window(num_keys: int, width: int, device: torch.device | str | None = None) -> Lifetimes:
    """Tokens 0..num_keys-1 that live for `width` steps, their own included: a sliding window."""
    return causal(num_keys, device).at_most(width)


def by_lifespan(birth: Tensor, death: Tensor, end: int, edges: Sequence[float]) -> Tensor:
    """Generations, int32: how many of the edges a key reaches with the steps that it lives until `end`.

    For keys that die at random: the young are many and die soon, the old are few. birth, death: any integers.
    """
    span = death.clamp(max=end) - birth
    return sum(((span >= edge).int() for edge in edges), start=torch.zeros_like(span, dtype=torch.int32))


def query_intervals(
    life: Lifetimes, time: Tensor | None, *, heads: int, kv_heads: int, num_queries: int, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Lifetimes in query numbers: key j is met by exactly the queries start_j <= i < stop_j; stop <= start: by none.

    time: int32, ascending, broadcastable to [B, H, Nq]; None = 0..Nq-1. Returns int32 start and stop in 0..Nq,
    [B or 1, G or 1, r or 1, Nk] with r = H / G: an axis along which all lists are alike is 1 long (it is found
    alike where it is missing, 1 long, or an `expand`).
    """
    birth, death = torch.broadcast_tensors(
        unexpanded(life.birth, num_keys).unsqueeze(2), unexpanded(life.death, num_keys).unsqueeze(2)
    )
    if time is None:
        return birth.clamp(0, num_queries), death.clamp(0, num_queries)
    # A query at FOREVER stands behind every death: nobody's interval reaches it.
    time = unexpanded(time, num_queries)
    if time.shape[0] == time.shape[1] == 1:
        time = time[0, 0].contiguous()
    else:
        time = time.unsqueeze(2) if time.shape[1] == 1 else time.unflatten(1, (kv_heads, heads // kv_heads))
        rows = torch.broadcast_shapes(time.shape[:3], birth.shape[:3])
        time = time.expand(*rows, -1).contiguous()
        birth, death = (x.expand(*rows, -1) for x in (birth, death))
    start, stop = (torch.searchsorted(time, x.contiguous(), out_int32=True) for x in (birth, death))
    return start, stop


def living_pairs(
    life: Lifetimes,
    time: Tensor | None = None,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    num_queries: int,
    num_keys: int,
) -> int:
    """Number of (query, living key) pairs, summed over batch and query heads: the work of one `attend`.

    Shapes as in `attend`. Counted exactly by sorted searches, in time and memory linear in Nk (log Nq).
    """
    start, stop = query_intervals(
        life, time, heads=heads, kv_heads=kv_heads, num_queries=num_queries, num_keys=num_keys
    )
    met = (stop.long() - start).clamp(min=0)
    return int(met.expand(batch, kv_heads, heads // kv_heads, num_keys).sum())


def unexpanded(x: Tensor, length: int) -> Tensor:
    """`x` as [B or 1, G or H or 1, length], 1 long where it only repeats."""
    x = x.reshape((1,) * (3 - x.dim()) + tuple(x.shape))
    for axis in (0, 1):
        if x.stride(axis) == 0:
            x = x.narrow(axis, 0, 1)
    return x.expand(-1, -1, length)
