"""The dense path of `attend`, through torch's fused CPU kernel: groups of keys that consecutive stretches of queries
meet.

In a causal group each key is born one query after the key before it, and all die together: the whole row (dense
causal), a block, a document. In the other kind all are born together, too: one more token behind a cache, or what a
block reads.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.ops.attend_operands import Gradients, Operands, empty_heads_last, heads_last


class Stretch(NamedTuple):
    """`length` neighbours from `first` on; the next ones begin `step` further on."""

    first: int
    length: int
    step: int


class Run(NamedTuple):
    """`number` groups of equal size at equal distances: stretches of queries, and of the keys that they meet."""

    queries: Stretch
    keys: Stretch
    number: int


class Segments(NamedTuple):
    """The runs of each batch row (one row: all are alike). Who is in none of them meets nobody."""

    rows: list[list[Run]]
    causal: bool

    @property
    def longest(self) -> int:
        """Queries of the longest group."""
        return max((run.queries.length for row in self.rows for run in row), default=0)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def find_segments(start: Tensor, stop: Tensor, num_queries: int, biased: bool = False) -> Segments | None:
    """The segments of the query intervals [B or 1, G or 1, r or 1, Nk], or None where keys live otherwise; `biased`:
    and where the kernel knows no key bias, in causal groups."""
    num_keys = start.shape[-1]
    if num_keys == 0 or num_queries == 0:
        return None
    if bool(start.amax() == 0) and bool(stop.amin() == num_queries):
        everybody = Run(Stretch(0, num_queries, num_queries), Stretch(0, num_keys, num_keys), 1)
        return Segments([[everybody]], causal=False)
    if start.shape[1] * start.shape[2] != 1:
        return None
    kinds, rows = set(), []
    for row in zip(start.flatten(0, 2), stop.flatten(0, 2), strict=True):
        found = _find_runs(*row)
        if found is None:
            return None
        kinds.add(found[0])
        rows.append(found[1])
    causal = kinds.pop()
    return None if kinds or (causal and biased) else Segments(rows, causal)


def _find_runs(start: Tensor, stop: Tensor) -> tuple[bool, list[Run]] | None:
    """Whether the groups are causal, and their runs, from query intervals [Nk]."""
    met = (stop > start).nonzero().squeeze(1)
    start, stop = start[met].long(), stop[met].long()
    if len(met) == 0 or bool((stop[1:] < stop[:-1]).any()):
        return None
    ends, sizes = stop.unique_consecutive(return_counts=True)
    first = sizes.cumsum(0) - sizes
    begins, keys = start[first], met[first]
    together = met[first + sizes - 1] - keys + 1 == sizes
    if not bool(together.all()) or bool((begins[1:] < ends[:-1]).any()):
        return None
    late = start - begins.repeat_interleave(sizes)
    causal = bool((late != 0).any())
    if causal:
        place = torch.arange(len(met), device=met.device) - first.repeat_interleave(sizes)
        if not bool((late == place).all()) or not bool((ends == begins + sizes).all()):
            return None
    groups = zip(begins.tolist(), (ends - begins).tolist(), keys.tolist(), sizes.tolist(), strict=True)
    runs: list[Run] = []
    for query, queries, key, number in groups:
        alone = Run(Stretch(query, queries, queries), Stretch(key, number, number), 1)
        joined = _joined(runs[-1], alone) if runs else None
        if joined is None:
            runs.append(alone)
        else:
            runs[-1] = joined
    return causal, runs


def _joined(run: Run, group: Run) -> Run | None:
    """The run with one more group behind it, if that is as large and as far on as the others."""
    queries, keys = (_one_more(*pair, run.number) for pair in ((run.queries, group.queries), (run.keys, group.keys)))
    return None if queries is None or keys is None else Run(queries, keys, run.number + 1)


def _one_more(mine: Stretch, new: Stretch, number: int) -> Stretch | None:
    step = new.first - mine.first if number == 1 else mine.step
    if new.length != mine.length or new.first != mine.first + number * step or step < mine.length:
        return None
    return mine._replace(step=step)


def segments_forward(x: Operands, segments: Segments) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend`, heads behind tokens in memory; a bias only where groups are not causal."""
    q, k, v, bias, scale = x.q, x.k, x.v, x.bias, x.scale
    value_dim, group = v.shape[-1], q.shape[1] // k.shape[1]
    width = max(q.shape[-1], value_dim)

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> list[Tensor]:
        mask = _as_mask(bias, group)
        q, k, v = (_widened(x, width) for x in (q, k, v))
        out, lse = _flash(q, k, v, is_causal=segments.causal, attn_mask=mask, scale=scale)
        if mask is not None:  # of a query that meets nobody the kernel says 0
            lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
        return [out[..., :value_dim], lse]

    if _one_call(segments, q, k):
        out, lse = call(q, k, v, bias)
        return heads_last(out), heads_last(lse)
    out = empty_heads_last(q, v.shape[-1])
    lse = empty_heads_last(q, dtype=torch.promote_types(q.dtype, torch.float32))
    for target, nothing in ((out, 0.0), (lse, -torch.inf)):
        _fill_rest(target, segments, nothing, lambda run: run.queries)
    for examples, run in _each(segments, len(q)):
        here = call(*_fold(run.queries, run, examples, q), *_fold(run.keys, run, examples, k, v, bias))
        _unfold(run.queries, run, examples, (out, lse), here)
    return out, lse


def segments_backward(
    dout: Tensor, dlse: Tensor | None, x: Operands, out: Tensor, lse: Tensor, segments: Segments, fixed: int = 0
) -> Gradients:
    """Gradients of q, k without its last `fixed` columns, and v, heads behind tokens in memory.

    The kernel knows no gradient of lse; one more value column of zeros brings it in. It computes delta = sum(out *
    dout) per query. With out' = [out, -1], dout' = [dout, dlse] and v' = [v, 0] it computes delta - dlse, and the
    products dout' v'^T stay what they were: exactly what is needed.
    """
    q, k, v, bias, scale = x.q, x.k, x.v, x.bias, x.scale
    dtype, dim, value_dim, group = q.dtype, q.shape[-1], v.shape[-1], q.shape[1] // k.shape[1]
    wanted = dim - fixed
    if bias is not None or not _one_call(segments, q, k):  # weights exp(-inf - lse) of who meets nobody are 0, too
        nobody = lse == -torch.inf
        lse, dlse = lse.masked_fill(nobody, 0.0), None if dlse is None else dlse.masked_fill(nobody, 0.0)
    if dlse is not None:
        wide = lse.dtype  # a 16-bit dlse would lose what merge needs
        out = torch.cat([out.to(wide), out.new_full((*lse.shape, 1), -1.0, dtype=wide)], -1)
        dout = torch.cat([dout.to(wide), dlse.to(wide)[..., None]], -1)
        q, k, v = q.to(wide), k.to(wide), F.pad(v.to(wide), (0, 1))
    width = max(q.shape[-1], v.shape[-1])

    def call(
        q: Tensor, dout: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        mask, causal = _as_mask(bias, group), segments.causal
        dout, q, k, v, out = (_widened(x, width) for x in (dout, q, k, v, out))
        dq, dk, dv = _flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
        return [dq[..., :dim], dk[..., :wanted], dv[..., :value_dim]]

    if _one_call(segments, q, k):
        dq, dk, dv = (heads_last(t.to(dtype)) for t in call(q, dout, out, lse, k, v, bias))
        return Gradients(dq, dk, dv, None, None, None)
    dq, dk, dv = (empty_heads_last(x, width, dtype=dtype) for x, width in ((q, dim), (k, wanted), (v, value_dim)))
    _fill_rest(dq, segments, 0.0, lambda run: run.queries)
    for target in (dk, dv):
        _fill_rest(target, segments, 0.0, lambda run: run.keys)
    for examples, run in _each(segments, len(q)):
        queries = _fold(run.queries, run, examples, q, dout, out, lse)
        here = call(*queries, *_fold(run.keys, run, examples, k, v, bias))
        _unfold(run.queries, run, examples, (dq,), here[:1])
        _unfold(run.keys, run, examples, (dk, dv), here[1:])
    return Gradients(dq, dk, dv, None, None, None)


def _one_call(segments: Segments, q: Tensor, k: Tensor) -> bool:
    """Whether a single group has all queries and keys of all rows."""
    (first, *others), *other_rows = segments.rows
    return not others and not other_rows and (first.queries.length, first.keys.length) == (q.shape[2], k.shape[2])


def _each(segments: Segments, batch: int) -> Iterator[tuple[slice, Run]]:
    """The runs, each with the examples that it stands for."""
    alike = batch // len(segments.rows)
    for row, runs in enumerate(segments.rows):
        for run in runs:
            yield slice(row * alike, (row + 1) * alike), run


def _fold(where: Stretch, run: Run, examples: slice, *tensors: Tensor | None) -> list[Any]:
    """[B, heads, n, ...] -> the run's groups as [b * number, heads, length, ...]; None stays None."""
    return [None if x is None else _groups(where, run, x[examples]).flatten(0, 1) for x in tensors]


def _unfold(where: Stretch, run: Run, examples: slice, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """The reverse of `_fold`, into the targets [B, heads, n, ...]."""
    for target, value in zip(targets, values, strict=True):
        places = _groups(where, run, target[examples])
        places.copy_(value.unflatten(0, places.shape[:2]))


def _fill_rest(target: Tensor, segments: Segments, value: float, of: Callable[[Run], Stretch]) -> None:
    """`value` into the places of a target [B, heads, n, ...] that no group of `of` its runs will write."""
    alike = len(target) // len(segments.rows)
    for row, runs in enumerate(segments.rows):
        mine, end = target[row * alike : (row + 1) * alike], 0
        for run in runs:
            first, length, step = of(run)
            mine[:, :, end:first] = value
            if step > length and run.number > 1:
                _groups(Stretch(first + length, step - length, step), run._replace(number=run.number - 1), mine)[:] = (
                    value
                )
            end = first + (run.number - 1) * step + length
        mine[:, :, end:] = value


def _groups(where: Stretch, run: Run, x: Tensor) -> Tensor:
    """[b, heads, n, ...] -> a view [b, number, heads, length, ...]."""
    x = x[:, :, where.first : where.first + (run.number - 1) * where.step + where.length]
    return x.unfold(2, where.length, where.step).movedim(-1, 3).transpose(1, 2)


def _as_mask(bias: Tensor | None, group: int) -> Tensor | None:
    """[b, G, keys] -> [b, H, 1, keys]."""
    return None if bias is None else bias.repeat_interleave(group, 1)[:, :, None]


def _widened(x: Tensor, width: int) -> Tensor:
    """Zero columns up to `width` (the kernel wants one width for all), and the last dimension dense."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
