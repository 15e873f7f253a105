"""The dense path of `attend`, through torch's fused CPU kernel: causal attention inside consecutive segments.

A segment is a stretch of tokens that all live to its end: the whole row (dense causal), a block, a document. Beside
it, the case that every query meets every key: one more token behind a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Run = tuple[int, int, int]
"""(first token, length, number): that many consecutive segments of that length."""


@dataclass(frozen=True)
class Segments:
    """The runs of each batch row (one row: all are alike); not causal: all queries meet all keys."""

    rows: list[list[Run]]
    causal: bool = True


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def find_segments(start: Tensor, stop: Tensor, num_queries: int) -> Segments | None:
    """The segments of the query intervals [B or 1, G or 1, r or 1, Nk], or None where keys live otherwise."""
    num_keys = start.shape[-1]
    if num_keys == 0 or num_queries == 0:
        return None
    if bool(start.amax() == 0) and bool(stop.amin() == num_queries):
        return Segments([[(0, num_queries, 1)]], causal=False)
    if start.shape[1] * start.shape[2] != 1 or num_keys != num_queries:
        return None
    start, stop = start.flatten(0, 2), stop.flatten(0, 2)
    own = torch.arange(num_keys, dtype=start.dtype, device=start.device)
    # Ends that never decrease, and an end that is the end of its own last token: the tokens fall into segments.
    last = (stop - 1).clamp(min=0).long()
    if not bool(((start == own) & (stop > own) & (stop.gather(-1, last) == stop)).all()):
        return None
    if not bool((stop[:, 1:] >= stop[:, :-1]).all()):
        return None
    return Segments([_runs(torch.unique_consecutive(row).tolist()) for row in stop])


def _runs(ends: list[int]) -> list[Run]:
    """Segments by their ends, equal neighbours joined into one run."""
    runs: list[Run] = []
    begin = 0
    for end in ends:
        length = end - begin
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0], length, runs[-1][2] + 1)
        else:
            runs.append((begin, length, 1))
        begin = end
    return runs


def segments_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse). q [B, H, T, D], k [B, G, T, D], v [B, G, T, Dv]."""
    width = max(q.shape[-1], v.shape[-1])

    def call(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return _flash(*(_widened(x, width) for x in qkv), is_causal=segments.causal, scale=scale)

    out, lse = _by_segment(call, (q, k, v), segments.rows)
    return out[..., : v.shape[-1]], lse


def segments_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv). The kernel knows no gradient of lse; one more value column of zeros brings it in.

    The kernel computes delta = sum(out * dout) per query. With out' = [out, -1], dout' = [dout, dlse] and
    v' = [v, 0] it computes delta - dlse, and the products dout' v'^T stay what they were: exactly what is needed.
    """
    dtype, dim, value_dim = q.dtype, q.shape[-1], v.shape[-1]
    if dlse is not None:
        wide = lse.dtype  # a 16-bit dlse would lose what merge needs
        out = torch.cat([out.to(wide), out.new_full((*lse.shape, 1), -1.0, dtype=wide)], -1)
        dout = torch.cat([dout.to(wide), dlse.to(wide)[..., None]], -1)
        q, k, v = q.to(wide), k.to(wide), F.pad(v.to(wide), (0, 1))
    width = max(q.shape[-1], v.shape[-1])

    def call(dout: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        *qkv_out, lse = saved
        dout, q, k, v, out = (_widened(x, width) for x in (dout, *qkv_out))
        return _flash_backward(dout, q, k, v, out, lse, 0.0, segments.causal, scale=scale)

    dq, dk, dv = _by_segment(call, (dout, q, k, v, out, lse), segments.rows)
    return dq[..., :dim].to(dtype), dk[..., :dim].to(dtype), dv[..., :value_dim].to(dtype)


def _by_segment(
    call: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], rows: list[list[Run]]
) -> tuple[Tensor, ...]:
    """`call` on every run of segments, equal segments as one batch; results put together along the tokens."""
    if len(rows) == 1 and len(rows[0]) == 1 and rows[0][0][2] == 1:
        return call(*inputs)
    batch = inputs[0].shape[0] // len(rows)
    by_row = []
    for row, runs in enumerate(rows):
        mine = [x[row * batch : (row + 1) * batch] for x in inputs]
        results = [[_unfold(y, batch) for y in call(*(_fold(x, *run) for x in mine))] for run in runs]
        by_row.append([torch.cat(pieces, 2) for pieces in zip(*results)])
    return tuple(torch.cat(pieces, 0) for pieces in zip(*by_row))


def _fold(x: Tensor, first: int, length: int, number: int) -> Tensor:
    """[b, heads, T, ...] -> the run's segments as [b * number, heads, length, ...]."""
    x = x[:, :, first : first + length * number]
    return x if number == 1 else x.unflatten(2, (number, length)).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, batch: int) -> Tensor:
    """[b * number, heads, length, ...] -> [b, heads, number * length, ...]."""
    return x if x.shape[0] == batch else x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def _widened(x: Tensor, width: int) -> Tensor:
    """Zero columns up to `width` (the kernel wants one width for all), and the last dimension dense."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
