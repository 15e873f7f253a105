"""Projections of chosen tokens: each head takes its own tokens to its own matrix, and back to their places.

`gather_project` and `scatter_project` are each other's backward pass. The tokens of all heads side by side,
[B, H, n, d], would take more memory than all else in a mixer of many heads; here they exist for some heads at a time.

Legend of shapes: B batch, T tokens, H heads, n places in the list of a head, d model width, m width behind a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

AT_ONCE = 2**20  # numbers of gathered tokens: 4 MiB of float32, which stay in a cache


def gather_project(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """For each head the chosen tokens, times its matrix.

    x [B, T, d]; index int64 [B, H, n], a token of the row or -1 = nobody; weight [H, d, m], in x's type. Returns
    [B, H, n, m], 0 where nobody was chosen. Differentiable in x and weight; sums in a fixed order. Under autocast both
    are rounded as by a linear layer. ValueError where shapes or types do not fit.
    """
    x, weight = _autocast(x), _autocast(weight)
    _check("x", x, (index.shape[0], None, weight.shape[1]), index, weight)
    return _GatherProject.apply(x, index, weight)


def scatter_project(y: Tensor, index: Tensor, gate: Tensor, weight: Tensor, length: int) -> Tensor:
    """The sum over the heads of their gated tokens, each times the matrix of its head, at the tokens' places.

    y [B, H, n, m]; index int64 [B, H, n], no token twice in a list, -1 = nobody (whatever y holds there); gate
    [B, H, n]; weight [H, m, d], in y's type; length T. Returns [B, T, d] in y's type, 0 where no head chose. Summed in
    at least float32, in the order of the heads. Differentiable in y, gate and weight. Otherwise as `gather_project`.
    """
    y, weight = _autocast(y), _autocast(weight)
    _check("y", y, (*index.shape, weight.shape[1]), index, weight)
    return _ScatterProject.apply(y * gate[..., None].to(y.dtype), index, weight, length)


class _GatherProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, index, weight)
        return torch.ops.attention.gather_project(x, index, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, index, weight = ctx.saved_tensors
        to_x, _, to_weight = ctx.needs_input_grad
        return (
            torch.ops.attention.scatter_project(grad, index, weight.mT, x.shape[1]) if to_x else None,
            None,
            torch.ops.attention.gather_outer(x, index, grad) if to_weight else None,
        )


class _ScatterProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, index: Tensor, weight: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(y, index, weight)
        return torch.ops.attention.scatter_project(y, index, weight, length)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, index, weight = ctx.saved_tensors
        to_y, _, to_weight, _ = ctx.needs_input_grad
        return (
            torch.ops.attention.gather_project(grad, index, weight.mT) if to_y else None,
            None,
            torch.ops.attention.gather_outer(grad, index, y).mT if to_weight else None,
            None,
        )


# The operators: one node each for FLOP counts and compile.

_library = torch.library.Library("attention", "FRAGMENT")
_library.define("gather_project(Tensor x, Tensor index, Tensor weight) -> Tensor")
_library.define("scatter_project(Tensor y, Tensor index, Tensor weight, int length) -> Tensor")
_library.define("gather_outer(Tensor x, Tensor index, Tensor y) -> Tensor")


def _gather_project(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    (batch, heads, count), width = index.shape, weight.shape[2]
    out = x.new_empty(heads, batch * count, width)
    rows, place = _with_nobody(x), _places(index, x.shape[1])
    for some in _some_heads(index, x.shape[2]):
        torch.bmm(_gather(rows, place[some]), weight[some], out=out[some])
    return out.unflatten(1, (batch, count)).transpose(0, 1)


def _scatter_project(y: Tensor, index: Tensor, weight: Tensor, length: int) -> Tensor:
    batch, width = y.shape[0], weight.shape[2]
    wide = torch.promote_types(y.dtype, torch.float32)
    total = y.new_zeros(batch * length + 1, width, dtype=wide)  # the last row collects what nobody gets
    by_head, place = y.transpose(0, 1).flatten(1, 2), _places(index, length)
    for some in _some_heads(index, width):
        for values, of_head in zip(torch.bmm(by_head[some], weight[some]), place[some]):
            total.index_add_(
                0, of_head, values.to(wide)
            )  # one head at a time: no token stands twice, so their order is free
    return total[:-1].unflatten(0, (batch, length)).to(y.dtype)


def _gather_outer(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """The gradient of a matrix: the sum over a head's places of token times y, [H, d, m]."""
    by_head = y.transpose(0, 1).flatten(1, 2)
    out = x.new_empty(index.shape[1], x.shape[2], y.shape[3])
    rows, place = _with_nobody(x), _places(index, x.shape[1])
    for some in _some_heads(index, x.shape[2]):
        torch.bmm(_gather(rows, place[some]).mT, by_head[some], out=out[some])
    return out


def _with_nobody(x: Tensor) -> Tensor:
    """[B, T, d] -> [B T + 1, d]: all rows, and one of zeros for who was not chosen."""
    return torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[2])])


def _places(index: Tensor, length: int) -> Tensor:
    """[B, H, n] -> [H, B n], numbers of rows of all sequences laid end to end; behind the last one stands nobody."""
    batch = index.shape[0]
    begin = length * torch.arange(batch, device=index.device)[:, None, None]
    return torch.where(index < 0, batch * length, index + begin).transpose(0, 1).flatten(1)


def _gather(rows: Tensor, place: Tensor) -> Tensor:
    """[rows, d] by [h, n] -> [h, n, d]."""
    return rows.index_select(0, place.flatten()).unflatten(0, place.shape)


def _some_heads(index: Tensor, width: int) -> Iterator[slice]:
    """Ranges of heads whose tokens may exist together."""
    batch, heads, count = index.shape
    step = max(1, AT_ONCE // max(1, batch * count * width))
    return (slice(first, first + step) for first in range(0, heads, step))


_library.impl("gather_project", _gather_project, "CompositeExplicitAutograd")
_library.impl("scatter_project", _scatter_project, "CompositeExplicitAutograd")
_library.impl("gather_outer", _gather_outer, "CompositeExplicitAutograd")


@torch.library.register_fake("attention::gather_project", lib=_library)
def _fake_gather_project(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    batch, heads, count = index.shape
    return x.new_empty(heads, batch, count, weight.shape[2]).transpose(0, 1)


@torch.library.register_fake("attention::scatter_project", lib=_library)
def _fake_scatter_project(y: Tensor, index: Tensor, weight: Tensor, length: int) -> Tensor:
    return y.new_empty(y.shape[0], length, weight.shape[2])


@torch.library.register_fake("attention::gather_outer", lib=_library)
def _fake_gather_outer(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(index.shape[1], x.shape[2], y.shape[3])


@register_flop_formula(
    [torch.ops.attention.gather_project, torch.ops.attention.scatter_project, torch.ops.attention.gather_outer],
    get_raw=True,
)
def _flops(a: Tensor, index: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """One product of d x m per chosen token, padding not counted."""
    width = a.shape[-1] * b.shape[-1]
    return 2 * width * int((index >= 0).sum())


def _autocast(x: Tensor) -> Tensor:
    """In the type that a linear layer would take it in."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _check(name: str, x: Tensor, shape: tuple[int | None, ...], index: Tensor, weight: Tensor) -> None:
    if index.dtype != torch.int64 or index.dim() != 3:
        raise ValueError(f"index: expected int64 [batch, heads, places], got {index.dtype} {tuple(index.shape)}")
    if weight.dim() != 3 or weight.shape[0] != index.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight: expected {x.dtype} [{index.shape[1]}, width, width], got {weight.dtype} {tuple(weight.shape)}"
        )
    if x.dim() != len(shape) or any(b not in (None, a) for a, b in zip(x.shape, shape)):
        wanted = ", ".join("tokens" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {tuple(x.shape)}")
