"""How a call of `attend` is computed outside the GPU, from its lifetimes: found once, and remembered for the next layer
and the backward pass."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attention.lifetimes import Lifetimes, query_intervals
from attention.ops.attend_operands import Operands
from attention.ops.attend_plan import FEW_QUERIES, Part, make_parts
from attention.ops.attend_segments import Segments, find_segments

REMEMBERED = 16  # routes kept for the next call, the backward pass or the next layer
LARGEST_REMEMBERED = 2**16  # numbers in one of them: static patterns, and of those that follow from data the small


@dataclass(frozen=True, eq=False)
class Route:
    """How one call is computed: by torch's fused kernel, if its keys live in segments; else by tiles of its queries
    that meet the keys, or by their `parts`.

    start, stop   query intervals of the keys, [B or 1, G or 1, r or 1, Nk]
    """

    segments: Segments | None
    start: Tensor
    stop: Tensor
    rows: tuple[int, int, int, int]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The tiles that `attend_tiles` walks through."""
        batch, heads, kv_heads, num_queries = self.rows
        sizes = {"batch": batch, "kv_heads": kv_heads, "group": heads // kv_heads, "num_queries": num_queries}
        return make_parts(self.start, self.stop, **sizes)


_remembered: list[tuple[tuple[object, ...], list[Tensor], Route]] = []


def find_route(x: Operands, life: Lifetimes, time: Tensor | None, wants_bias: bool = False) -> Route:
    """The route for these shapes and lifetimes; from memory, if the very same lifetimes came lately. The fused kernel
    knows no gradient of a bias."""
    fused = x.u is None and x.q.device.type == "cpu" and _alike(x.q.shape[-1], x.v.shape[-1])
    fused = fused and not (wants_bias and x.bias is not None)
    given = [life.birth, life.death] if time is None else [life.birth, life.death, time]
    key = (x.q.shape, x.k.shape[:3], len(given), fused, x.bias is not None, x.q.device)
    for known_key, known, route in _remembered:
        if known_key == key and all(map(torch.equal, known, given)):
            return route
    route = _new_route(x, life, time, fused)
    if x.q.shape[2] > FEW_QUERIES and sum(t.numel() for t in given) <= LARGEST_REMEMBERED:
        # Compared by content, and kept as copies: nobody can change what is remembered.
        _remembered.insert(0, (key, [t.clone() for t in given], route))
        del _remembered[REMEMBERED:]
    return route


def _alike(width: int, value_width: int) -> bool:
    """Whether the fused kernel, which wants one width of all, is worth the zeros behind the narrower: with values twice
    as wide as keys the loop takes 0.8 of its time, with values four times as wide half of it (blocks of 512); where the
    keys are the wider ones, up to three times, the kernel wins."""
    return value_width < 2 * width and width <= 3 * value_width


def _new_route(x: Operands, life: Lifetimes, time: Tensor | None, fused: bool) -> Route:
    (batch, heads, num_queries, _), (kv_heads, num_keys) = x.q.shape, x.k.shape[1:3]
    start, stop = query_intervals(
        life, time, heads=heads, kv_heads=kv_heads, num_queries=num_queries, num_keys=num_keys
    )
    segments = find_segments(start, stop, num_queries, x.bias is not None) if fused else None
    return Route(segments, start, stop, (batch, heads, kv_heads, num_queries))
