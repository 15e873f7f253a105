"""`diagonal_scan`: linear recurrences side by side, each with a decay of its own (the damped EMA of Mega).

Legend of shapes: B batch, T tokens, C channels, N numbers that a channel remembers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attention.ops import scan_native, scan_torch

PATHS = ("torch", "native", "triton")
IMPLEMENTATIONS = ("reference", *PATHS)


def diagonal_scan(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the last h of the recurrence, for each channel and each n = 0..N-1 of it:

        h_t = exp(log_decay) h_{t-1} + b x_t, where h_{t-1} counts as 0 if reset_t;  y_t = sum over n of c h_t.

    x [B, T, C], floating; log_decay (at most 0), b, c [C, N]; h0 [B, C, N], what was before, default 0; reset bool
    [B, T], where a document begins.
    implementation   "torch"; "triton" (kernels for CUDA devices); "native" (kernels for CPUs, in C++); "reference"
                     (step by step: for tests). Default: the kernels of the device where they can take the operands,
                     else torch

    Returns y [B, T, C] and h [B, C, N] behind the last token, in at least float32 whatever the type of x, also under
    autocast: decays near 1 do not survive 16 bits. Differentiable in x, log_decay, b, c and h0, through y and h. No
    output depends on a later x in a single bit. Work and memory are linear in T. ValueError names the argument that
    does not fit.
    """
    _check(x, log_decay, b, c, h0, reset, implementation)
    if implementation == "reference":
        return diagonal_scan_reference(x, log_decay, b, c, h0, reset)
    wide = _wide(x, log_decay)
    log_decay, b, c = (t.to(wide) for t in (log_decay, b, c))
    if h0 is None:
        h0 = x.new_zeros(x.shape[0], *b.shape, dtype=wide)
    return torch.ops.attention.diagonal_scan(x, log_decay, b, c, h0.to(wide), reset, implementation or "")


def diagonal_scan_reference(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of `diagonal_scan`, token by token, by ordinary autograd."""
    wide = _wide(x, log_decay)
    x, decay, b, c = (t.to(wide) for t in (x, log_decay.exp(), b, c))
    h = x.new_zeros(x.shape[0], *b.shape) if h0 is None else h0.to(wide)
    y = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0.0)
        h = decay * h + b * x[:, t, :, None]
        y.append((c * h).sum(-1))
    return (torch.stack(y, 1) if y else torch.zeros_like(x)), h


# As operators: autograd, checkpointing and FLOP counts see one node.

_library = torch.library.Library("attention", "FRAGMENT")
_OPERANDS = "Tensor x, Tensor log_decay, Tensor b, Tensor c, Tensor h0, Tensor? reset"
_library.define(f"diagonal_scan({_OPERANDS}, str path) -> (Tensor y, Tensor h)")
_library.define(f"diagonal_scan_backward(Tensor dy, Tensor dh, {_OPERANDS}, str path) -> Tensor[]")


def _forward(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None, path: str
) -> tuple[Tensor, Tensor]:
    with _no_autocast(x):
        return _module(path, x, b).scan_forward(x, log_decay, b, c, h0, reset)


def _backward(
    dy: Tensor,
    dh: Tensor,
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    h0: Tensor,
    reset: Tensor | None,
    path: str,
) -> list[Tensor]:
    """Gradients of x, log_decay, b, c and h0."""
    with _no_autocast(x):
        dx, *others = _module(path, x, b).scan_backward(dy, dh, x, log_decay, b, c, h0, reset)
        return [dx.to(x.dtype), *others]


def _module(path: str, x: Tensor, b: Tensor) -> Any:
    """The module that computes; the Triton kernels' is imported by the first call that takes it, and Triton with it."""
    path = path or next(p for p in (("triton" if x.is_cuda else "native"), "torch") if _why_not(p, x, b) is None)
    if path != "triton":
        return scan_native if path == "native" else scan_torch
    from attention.ops import scan_triton

    return scan_triton


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.path = args
        ctx.save_for_backward(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.attention.diagonal_scan(*args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.attention.diagonal_scan_backward(dy, dh, *ctx.saved_tensors, ctx.path), None, None


def _differentiable(*args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        return _Scan.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attention.diagonal_scan(*args)


_library.impl("diagonal_scan", _forward, "CompositeExplicitAutograd")
_library.impl("diagonal_scan_backward", _backward, "CompositeExplicitAutograd")
_library.impl("diagonal_scan", _differentiable, "Autograd")


@torch.library.register_fake("attention::diagonal_scan", lib=_library)
def _fake_forward(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=h0.dtype), h0.new_empty(h0.shape)


@torch.library.register_fake("attention::diagonal_scan_backward", lib=_library)
def _fake_backward(dy: Tensor, dh: Tensor, *operands: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in operands[:5]]


@register_flop_formula(torch.ops.attention.diagonal_scan, get_raw=True)
def _forward_flops(x: Tensor, log_decay: Tensor, *args: Any, **kwargs: Any) -> int:
    """Three multiply-adds per token, channel and n, whatever way they are computed: decay h, b x, c h."""
    return 6 * x.numel() * log_decay.shape[1]


@register_flop_formula(torch.ops.attention.diagonal_scan_backward, get_raw=True)
def _backward_flops(dy: Tensor, dh: Tensor, x: Tensor, log_decay: Tensor, *args: Any, **kwargs: Any) -> int:
    """Three multiply-adds for the gradients of h and x, one for each of log_decay, b and c."""
    return 12 * x.numel() * log_decay.shape[1]


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, types are chosen here: autocast would round the products."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _wide(x: Tensor, log_decay: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, torch.float32), log_decay.dtype)


def _why_not(path: str, x: Tensor, b: Tensor) -> str | None:
    """What keeps one of PATHS from taking these inputs and parameters; None: nothing."""
    if path == "torch":
        return None
    if path == "native":
        return scan_native.why_not(x, b)
    try:
        from attention.ops import scan_triton
    except ModuleNotFoundError as error:
        return f"the Triton kernels need the package {error.name}"
    return scan_triton.why_not(x, b)


def _check(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    implementation: str | None,
) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation: expected None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected floating [batch, tokens, channels], got {x.dtype} {tuple(x.shape)}")
    batch, length, channels = x.shape
    if log_decay.dim() != 2 or log_decay.shape[0] != channels:
        raise ValueError(f"log_decay: expected shape [{channels}, n] for x's channels, got {tuple(log_decay.shape)}")
    wanted = {"b": (b, log_decay.shape), "c": (c, log_decay.shape), "h0": (h0, (batch, *log_decay.shape))}
    for name, (t, shape) in wanted.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != (batch, length)):
        raise ValueError(f"reset: expected bool [{batch}, {length}], got {reset.dtype} {tuple(reset.shape)}")
    for name, t in (("log_decay", log_decay), ("b", b), ("c", c), ("h0", h0), ("reset", reset)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x's, got {t.device}")
    if implementation in PATHS:
        reason = _why_not(implementation, x, _wide_like(b, x, log_decay))
        if reason is not None:
            raise ValueError(f"implementation: {reason}")


def _wide_like(b: Tensor, x: Tensor, log_decay: Tensor) -> Tensor:
    return b.to(_wide(x, log_decay))
