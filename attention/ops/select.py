"""Streaming top-k: of every prefix of a document, who is among its best; and lists of those who were chosen.

The best of a prefix are the `keep` largest in a total order: by score, of equal scores the newest. So a token is alive
from its own time until `keep` better ones exist, and who is alive at a time does not depend on later tokens.

Legend of shapes: B batch, H heads, N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.lifetimes import FOREVER
from attention.ops import select_native


def streaming_top_k(
    score: Tensor, keep: int, *, start: Tensor | None = None, time: Tensor | None = None, include_first: bool = False
) -> Tensor:
    """The first time at which `keep` better tokens of the same document exist.

    score   [B, H, N], any floating type, of tokens in the order of time; NaN counts as -inf, -0.0 as 0.0
    keep    how many are alive at most; at least 1, with `include_first` at least 2
    start   int64, broadcastable to [B, H, N]: when the token's document began, a later document later; default: all
            are of one document that began at 0
    time    int64, broadcastable to [B, H, N]; default 0..N-1. FOREVER marks padding, which may stand anywhere
    include_first   the first token of a document (at `time` = `start`) never dies; the others compete for keep - 1

    Returns death, int64 [B, H, N]: FOREVER while there are fewer than `keep`, the token's own time if it is outranked
    at birth. It does not know when a document ends. The dead decide nothing, so to go on later it is enough to give
    those alive again, in front of the new tokens. Work N log N, whatever `keep`; no gradient. ValueError for a `keep`
    that is too small.
    """
    if keep < 1 + include_first:
        raise ValueError(f"keep must be >= {1 + include_first}, got {keep}")
    token = torch.arange(score.shape[-1], device=score.device)
    score = score.detach().masked_fill(score.isnan(), -torch.inf)
    time = (token if time is None else time).expand(score.shape)
    began = torch.zeros_like(time) if start is None else start.expand(score.shape)
    began = began.masked_fill(time == FOREVER, -FOREVER)  # before all documents, so in the way of none
    if select_native.takes(score):
        return select_native.streaming_top_k(score, time, began, keep, include_first)
    return _all_prefixes(score, time, began, keep, include_first, start is not None)


def listed(chosen: Tensor) -> Tensor:
    """The numbers of the chosen, ascending, filled up with -1: bool [..., N] -> int64 [..., n].

    n is the most that any list chose, so this waits for the device once.
    """
    place = chosen.cumsum(-1)
    longest = int(place[..., -1].max()) if place.numel() else 0
    numbers = torch.arange(chosen.shape[-1], device=chosen.device).expand(chosen.shape)
    lists = place.new_full((*chosen.shape[:-1], longest + 1), -1)
    # Who is not chosen goes to a last column, which is dropped.
    return lists.scatter_(-1, torch.where(chosen, place - 1, longest), numbers)[..., :longest]


def _all_prefixes(
    score: Tensor, time: Tensor, began: Tensor, keep: int, include_first: bool, documents: bool
) -> Tensor:
    """`streaming_top_k` on any device, all tokens at once; `documents`: there may be several."""
    number = score.shape[-1]
    first = time == began
    if include_first:
        score = score.masked_fill(first, -torch.inf)  # being the oldest, it is the least: it outranks nobody

    order = score.argsort(dim=-1, stable=True)
    if documents:
        order = order.gather(-1, began.gather(-1, order).argsort(dim=-1, stable=True))
    order = order.flip(-1)
    # In front of a token stand the better ones of its document, and all those of later documents: they have larger
    # numbers, so they come last among the smallest.
    outranked = _smallest_of_prefixes(order, keep - include_first)
    outranked = torch.empty_like(order).scatter_(-1, order, outranked)

    by = outranked.clamp(max=max(number - 1, 0))
    never = outranked == number
    if documents:
        never |= began.gather(-1, by) != began
    death = torch.maximum(time.gather(-1, by), time).masked_fill(never, FOREVER)
    return death.masked_fill(first, FOREVER) if include_first else death


def _smallest_of_prefixes(order: Tensor, keep: int) -> Tensor:
    """For each place of a permutation [..., N] the keep-th smallest number in front of it; N where fewer stand there.

    All prefixes are asked at once, from the highest bit of the numbers to the lowest (a wavelet tree: Grossi et al.,
    "High-order entropy-compressed text indexes", 2003). At each level the numbers are sorted into nodes by the bits
    seen so far, in their first order inside a node. A prefix is, inside the node that holds what it looks for, again a
    prefix; as many of it as have a 0 in the next bit are the smaller ones.
    """
    number = order.shape[-1]
    place = torch.arange(number, device=order.device)
    if keep >= number:
        return torch.full_like(order, number)
    size = 1 << (number - 1).bit_length()  # every node of a complete tree is half zeros, half ones
    numbers = torch.cat([order, torch.arange(number, size, device=order.device).expand(*order.shape[:-1], -1)], -1)
    slot = torch.arange(size, device=order.device)

    node = torch.zeros_like(order)  # where the node begins: its smallest number, too
    end = place.expand_as(order)  # where the prefix ends
    wanted = torch.full_like(order, keep)
    half = size // 2
    while half:
        is_zero = (numbers & half) == 0
        zeros = is_zero.cumsum(-1)  # half of each node before this one are zeros
        in_front = F.pad(zeros, (1, 0)).gather(-1, end) - (node >> 1)
        small = wanted <= in_front
        end = torch.where(small, node + in_front, end + half - in_front)
        node = torch.where(small, node, node + half)
        wanted = torch.where(small, wanted, wanted - in_front)
        if half > 1:
            begin = slot // (2 * half) * half
            numbers = torch.empty_like(numbers).scatter_(
                -1, torch.where(is_zero, zeros + (begin - 1), slot - zeros + (begin + half)), numbers
            )
        half //= 2
    return node.masked_fill(place < keep, number)
