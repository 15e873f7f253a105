"""`diagonal_scan` by the Triton kernels: whether they can, and the launches.

Legend of shapes: B batch, T tokens, C channels, N numbers that a channel remembers, M chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from attention.kernels import scan as kernels

CHUNK = 64  # tokens of a program: it walks through them one by one
CHANNELS = 32  # of a program: a thread each, with up to NUMBERS numbers in registers
NUMBERS = 16
LARGEST = 64  # N
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(x: Tensor, b: Tensor) -> str | None:
    """What keeps the kernels from taking these inputs and parameters; None: nothing."""
    if x.dtype not in TYPES or b.dtype != torch.float32:
        return f"the Triton kernels take x in float32, bfloat16 or float16 with float32, got {x.dtype} with {b.dtype}"
    if b.shape[1] > LARGEST:
        return f"the Triton kernels remember up to {LARGEST} numbers of a channel, got {b.shape[1]}"
    if not x.is_cuda and not interpreted():
        return (
            f"the Triton kernels run on CUDA devices, got {x.device} "
            "(with TRITON_INTERPRET=1 in the environment from the start they run on a CPU, slowly)"
        )
    return None


def interpreted() -> bool:
    """Whether the kernels were imported to run in Triton's interpreter."""
    return not isinstance(kernels.scan_ends, triton.runtime.JITFunction)


def scan_forward(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, C] and h [B, C, N], as `scan_torch.scan_forward`."""
    if x.numel() == 0 or b.numel() == 0:
        return x.new_zeros(x.shape, dtype=torch.float32), h0.clone()
    call = _Call(x, log_decay, b, c, reset)
    y = torch.empty_like(call.x, dtype=torch.float32)
    starts, last = call.starts(h0)
    call.launch(kernels.scan_outputs, X=call.x, In=call.b, Out=call.c, Starts=starts, Y=y)
    return y, last.mT.contiguous()


def scan_backward(
    dy: Tensor, dh: Tensor, x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay, b, c and h0, as `scan_torch.scan_backward`."""
    if x.numel() == 0 or b.numel() == 0:
        none = [torch.zeros_like(t) for t in (log_decay, b, c)]
        return torch.zeros_like(x), none[0], none[1], none[2], dh.clone()
    call = _Call(x, log_decay, b, c, reset)
    dy = dy.contiguous()
    starts, _ = call.starts(h0)
    added = call.states()
    call.launch(kernels.scan_start_gradients, Dy=dy, Out=call.c, Added=added)
    dends, dh0 = call.between(added, dh, reverse=True)
    dx = torch.empty_like(call.x, dtype=torch.float32)
    call.launch(kernels.scan_input_gradients, Dy=dy, In=call.b, Out=call.c, Dends=dends, Dx=dx)
    partial = {name: call.states() for name in ("DlogDecay", "Din", "Dout")}
    operands = {"X": call.x, "Dy": dy, "In": call.b, "Out": call.c, "Starts": starts, "Dends": dends}
    call.launch(kernels.scan_parameter_gradients, **operands, **partial)
    dlog_decay, db, dc = (t.sum((0, 1)).mT.contiguous() for t in partial.values())
    return dx, dlog_decay, db, dc, dh0.mT.contiguous()


class _Call:
    """One call: its operands as the kernels read them, its launches."""

    def __init__(self, x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, reset: Tensor | None) -> None:
        self.x = x.contiguous()
        self.log_decay, self.b, self.c = (t.mT.contiguous() for t in (log_decay, b, c))
        self.batch, self.tokens, self.channels = x.shape
        self.numbers = b.shape[1]
        self.chunks = triton.cdiv(self.tokens, CHUNK)
        self.keep = torch.ones(self.batch, self.chunks, device=x.device)
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        if reset is not None:
            whole = F.pad(reset, (0, self.chunks * CHUNK - self.tokens)).unflatten(1, (self.chunks, CHUNK))
            self.keep = (~whole.any(2)).float()

    def starts(self, h0: Tensor) -> tuple[Tensor, Tensor]:
        """The states before each chunk [B, M, N, C], and behind the last [B, N, C]; h0 [B, C, N]."""
        ends = self.states()
        self.launch(kernels.scan_ends, X=self.x, In=self.b, Ends=ends)
        return self.between(ends, h0, reverse=False)

    def between(self, added: Tensor, first: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """From `first` [B, C, N] through all chunks: the states before each [B, M, N, C], and the last [B, N, C]."""
        first, states = first.mT.contiguous(), self.states()
        last = torch.empty_like(first)
        arguments = {"Added": added, "Keep": self.keep, "First": first, "States": states, "Last": last}
        self._run(kernels.scan_between, self.batch, **arguments, REVERSE=reverse)
        return states, last

    def launch(self, kernel: Any, **arguments: Any) -> None:
        """Run a kernel on every chunk."""
        reset = self.keep if self.reset is None else self.reset
        self._run(kernel, self.batch * self.chunks, **arguments, Reset=reset, HAS_RESET=self.reset is not None)

    def states(self) -> Tensor:
        """[B, M, N, C], not filled."""
        return self.b.new_empty(self.batch, self.chunks, self.numbers, self.channels)

    def _run(self, kernel: Any, rows: int, **arguments: Any) -> None:
        padded = triton.next_power_of_2(self.numbers)
        with torch.cuda.device_of(self.x):
            kernel[(triton.cdiv(self.channels, CHANNELS), rows)](
                **arguments,
                LogDecay=self.log_decay,
                tokens=self.tokens,
                chunks=self.chunks,
                n=self.numbers,
                channels=self.channels,
                CHUNK=CHUNK,
                N=padded,
                CHANNELS=CHANNELS,
                num_warps=max(1, padded // NUMBERS),
                enable_fp_fusion=True,  # Triton 3.10 changes its default
            )
