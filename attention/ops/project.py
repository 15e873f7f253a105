"""Projections of chosen tokens: each head takes its own tokens to its own matrix, and back to their places.

`gather_project` and `scatter_project` are each other's backward pass. The tokens of all heads side by side,
[B, H, n, d], would take more memory than all else in a mixer of many heads; here they exist for a few lists at a time.

Legend of shapes: B batch, T tokens, H heads, n places in the list of a head, d model width, m width behind a matrix.
In a block R rows of the batch, h heads, and the first c places of their lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

AT_ONCE = 2**18  # numbers of gathered tokens: 1 MiB of float32, which stays in a cache


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

    y [B, H, n, m]; index int64 [B, H, n], no token twice in a list, -1 = nobody (whatever y and gate hold there); gate
    [B, H, n]; weight [H, m, d], in y's type; length T. Returns [B, T, d] in y's type, 0 where no head chose. Summed in
    at least float32, in the order of the heads. Differentiable in y, gate and weight. Otherwise as `gather_project`.
    """
    y, weight = _autocast(y), _autocast(weight)
    _check("y", y, (*index.shape, weight.shape[1]), index, weight)
    if gate.shape != index.shape:
        raise ValueError(f"gate: expected shape {tuple(index.shape)} as index, got {tuple(gate.shape)}")
    return _ScatterProject.apply(y, index, gate, weight, length)


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
    def forward(ctx: Any, y: Tensor, index: Tensor, gate: Tensor, weight: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(y, index, gate, weight)
        return torch.ops.attention.scatter_project(y, index, weight, length, gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, index, gate, weight = ctx.saved_tensors
        to_y, _, to_gate, to_weight, _ = ctx.needs_input_grad
        dy = dgate = dweight = None
        if to_y or to_gate:
            gated = torch.ops.attention.gather_project(grad, index, weight.mT)  # the gradient of gate * y
            wide = gated.to(torch.promote_types(gate.dtype, y.dtype))
            dgate = (wide * y).sum(-1).masked_fill(index < 0, 0.0).to(gate.dtype)
            dy = gated * gate.masked_fill(index < 0, 0.0)[..., None].to(y.dtype)
        if to_weight:
            dweight = torch.ops.attention.gather_outer(grad, index, y, gate).mT
        return dy, None, dgate, dweight, None


# The operators: one node each for FLOP counts and compile.

_library = torch.library.Library("attention", "FRAGMENT")
_library.define("gather_project(Tensor x, Tensor index, Tensor weight) -> Tensor")
_library.define("scatter_project(Tensor y, Tensor index, Tensor weight, int length, Tensor? gate=None) -> Tensor")
_library.define("gather_outer(Tensor x, Tensor index, Tensor y, Tensor? gate=None) -> Tensor")


def _gather_project(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    (batch, heads, places), width = index.shape, weight.shape[2]
    out = x.new_empty(heads, batch, places, width)
    tokens = _with_nobody(x)
    for block in _blocks(index, x):
        mine = out[block.heads, block.rows]
        product = torch.bmm(block.take(tokens), weight[block.heads])
        mine[:, :, : block.places].copy_(product.view(*mine.shape[:2], block.places, width))
        mine[:, :, block.places :] = 0.0
    return out.transpose(0, 1)


def _scatter_project(y: Tensor, index: Tensor, weight: Tensor, length: int, gate: Tensor | None = None) -> Tensor:
    batch, width = y.shape[0], weight.shape[2]
    wide = torch.promote_types(y.dtype, torch.float32)
    total = y.new_zeros(batch * length + 1, width, dtype=wide)  # the last row collects what nobody gets
    for block in _blocks(index, total[:-1].view(batch, length, width)):
        product = torch.bmm(block.values(y, gate), weight[block.heads])
        for values, token in zip(product, block.token):  # inside one head no token stands twice: any order will do
            total.index_add_(0, token, values.to(wide))
    return total[:-1].unflatten(0, (batch, length)).to(y.dtype)


def _gather_outer(x: Tensor, index: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """The gradient of a matrix: the sum over a head's places of token times y, [H, d, m]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(index.shape[1], x.shape[2], y.shape[3], dtype=wide)
    tokens = _with_nobody(x)
    for block in _blocks(index, x):
        total[block.heads] += torch.bmm(block.take(tokens).mT, block.values(y, gate))
    return total.to(x.dtype)


class _Block(NamedTuple):
    """Lists whose tokens exist together.

    token [h, R c]: the rows of the batch laid end to end, and one more for nobody; empty [R, h, c]: who is nobody, None
    if all are somebody.
    """

    rows: slice
    heads: slice
    places: int
    token: Tensor
    empty: Tensor | None

    def take(self, tokens: Tensor) -> Tensor:
        """Of all tokens those of the lists, [h, R c, d]."""
        return tokens.index_select(0, self.token.flatten()).unflatten(0, self.token.shape)

    def values(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """What stands in y [B, H, n, m] for the lists, gated: [h, R c, m]; 0 where nobody was chosen."""
        mine = y[self.rows, self.heads, : self.places]
        if gate is not None:
            mine = mine * gate[self.rows, self.heads, : self.places, None].to(y.dtype)
        if self.empty is not None:
            mine = mine.masked_fill(self.empty[..., None], 0.0)
        return mine.transpose(0, 1).flatten(1, 2)


def _blocks(index: Tensor, x: Tensor) -> Iterator[_Block]:
    """All lists, in the order of the heads, a few at a time: of tokens of x [B, T, d] AT_ONCE numbers or, on a device
    that is told of every step, as many as x has; but one list at least."""
    (batch, heads, places), (_, length, width) = index.shape, x.shape
    nobody = index < 0
    begin = length * torch.arange(batch, device=index.device)[:, None, None]
    token = torch.where(nobody, batch * length, index + begin)
    used = _used_places(nobody)
    numbers = AT_ONCE if x.device.type == "cpu" else max(AT_ONCE, x.numel())
    lists = max(1, numbers // max(1, places * width))
    heads_at_once, rows_at_once = max(1, lists // batch), min(batch, lists)
    for head in range(0, heads, heads_at_once):
        for row in range(0, batch, rows_at_once):
            some = slice(row, row + rows_at_once), slice(head, head + heads_at_once)
            most = max((n for of_row in used[some[0]] for n in of_row[some[1]]), default=0)
            here = (*some, slice(most))
            empty = nobody[here]
            filled = empty.device.type == "cpu" and not bool(empty.any())
            yield _Block(*some, most, token[here].transpose(0, 1).flatten(1), None if filled else empty)


def _used_places(nobody: Tensor) -> list[list[int]]:
    """Of each list [B, H, n] the places up to its last token. Where to look would mean to wait for the device: all."""
    batch, heads, places = nobody.shape
    if nobody.device.type != "cpu":
        return [[places] * heads] * batch
    number = torch.arange(1, places + 1).expand(nobody.shape)
    return F.pad(number.masked_fill(nobody, 0), (1, 0)).amax(-1).tolist()


def _with_nobody(x: Tensor) -> Tensor:
    """[B, T, d] -> [B T + 1, d]: all tokens, and one of zeros for who was not chosen."""
    return torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[2])])


_library.impl("gather_project", _gather_project, "CompositeExplicitAutograd")
_library.impl("scatter_project", _scatter_project, "CompositeExplicitAutograd")
_library.impl("gather_outer", _gather_outer, "CompositeExplicitAutograd")


@torch.library.register_fake("attention::gather_project", lib=_library)
def _fake_gather_project(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    batch, heads, count = index.shape
    return x.new_empty(heads, batch, count, weight.shape[2]).transpose(0, 1)


@torch.library.register_fake("attention::scatter_project", lib=_library)
def _fake_scatter_project(y: Tensor, index: Tensor, weight: Tensor, length: int, gate: Tensor | None = None) -> Tensor:
    return y.new_empty(y.shape[0], length, weight.shape[2])


@torch.library.register_fake("attention::gather_outer", lib=_library)
def _fake_gather_outer(x: Tensor, index: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
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
