"""What the kernels become on a GPU, found out without one: registers, spills, shared memory, tensor core products.

    python -m tests.attention.kernels.compiled [--widths 64,128] [--types bfloat16] [--options plain] [--on 80] [--json]
    python -m tests.attention.kernels.compiled --of scan ...

Every kernel is compiled through its real launcher, so that arguments are specialised as in a run, for a device that is
not there (Hopper, or --on another of `configs.SHARED`). The wheel's own disassembler reads what came out. It knows
nothing of speed, races or addresses.
Needs a process in which TRITON_INTERPRET is unset: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from attention.kernels.configs import HOPPER, SHARED, WIDTHS
from attention.lifetimes import window
from attention.ops import attend_triton, scan_triton
from attention.ops.attend_operands import Operands
from lmtrain.table import table

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Operation:
    """Kernels that one operation launches; its widths (of heads; of `scan` numbers per channel) and options."""

    kernels: tuple[str, ...]
    widths: tuple[int, ...]
    options: tuple[str, ...]


OPERATIONS = {
    "attend": Operation(
        ("attend_forward", "attend_query_gradient", "attend_key_gradient", "attend_sum_segments"),
        WIDTHS,
        ("plain", "bias", "gate", "bias and gate"),
    ),
    "scan": Operation(
        (
            "scan_ends",
            "scan_between",
            "scan_outputs",
            "scan_start_gradients",
            "scan_input_gradients",
            "scan_parameter_gradients",
        ),
        (1, 4, 16, 32, scan_triton.LARGEST),
        ("plain", "resets"),
    ),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as machine code: registers and bytes of stack (spills) per thread, shared memory in bytes, and
    instructions: products of warpgroups (wgmma) and of warps (mma), loads of 16 bytes past the registers."""

    kernel: str
    type: str
    width: int
    options: str
    tile: str
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    wide_loads: int


class NoDevice:
    """Stands for the driver of a GPU that is not there. Triton asks once in a process: one architecture for each."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernel(job: tuple[str, str, int, str, int]) -> Compiled:
    """The kernel for a width, in a type, with options, as its operation would launch it on an architecture."""
    kernel, kind, width, options, on = job
    triton.runtime.driver.set_active(NoDevice(on))
    run, made = JITFunction.run, []

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self.fn.__name__ == kernel and not made:
            made.append((run(self, *args, grid=(1,), warmup=True, **kwargs), kwargs))

    here = mock.patch.object(attend_triton, "architecture", return_value=on)
    with here, mock.patch.object(JITFunction, "run", only_compile):
        if kernel.startswith("scan"):
            _scan(TYPES[kind], width, options)
        else:
            _call(TYPES[kind], width, options, forward=kernel == "attend_forward")
    code, arguments = made[0]
    return Compiled(kernel, kind, width, options, _tile(arguments), **_resources(code))


def _call(dtype: torch.dtype, width: int, options: str, forward: bool) -> None:
    """A call of such a size that the launcher makes every kernel's arguments."""
    batch, heads, kv_heads, length = 1, 8, 2, 2048

    def new(number: int) -> Tensor:
        return torch.zeros(batch, length, number, width, dtype=dtype).transpose(1, 2)

    def scores(number: int) -> Tensor:
        return torch.zeros(batch, number, length)

    bias = scores(kv_heads) if "bias" in options else None
    u, tau = (scores(kv_heads), scores(heads)) if "gate" in options else (None, None)
    x = Operands(new(heads), new(kv_heads), new(kv_heads), bias, u, tau, width**-0.5)
    if forward:
        attend_triton.attend_forward(x, window(length, 64), None)
    else:
        attend_triton.attend_backward(new(heads), None, x, window(length, 64), None, new(heads), scores(heads))


def _scan(dtype: torch.dtype, numbers: int, options: str) -> None:
    """The backward pass launches every kernel but one."""
    batch, length, channels = 2, 256, 64
    x = torch.zeros(batch, length, channels, dtype=dtype)
    parameters = [torch.zeros(channels, numbers) for _ in range(3)]
    state = torch.zeros(batch, channels, numbers)
    reset = torch.zeros(batch, length, dtype=torch.bool) if options == "resets" else None
    scan_triton.scan_forward(x, *parameters, state, reset)
    scan_triton.scan_backward(x.float(), state, x, *parameters, state, reset)


def _tile(arguments: dict[str, Any]) -> str:
    sides = "x".join(str(arguments[side]) for side in ("QUERIES", "KEYS", "CHUNK", "CHANNELS") if side in arguments)
    loops = 1 + arguments.get("TWO_LOOPS", 0)
    return f"{sides} w{arguments['num_warps']} s{arguments.get('num_stages', 3)} l{loops}"


def _resources(code: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": code.metadata.shared,
        "wgmma": len(re.findall(r"\bHGMMA\.", sass)),
        "mma": len(re.findall(r"\bHMMA\.", sass)),
        "wide_loads": len(re.findall(r"\bLDGSTS\S*\.128", sass)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--of", default="attend", choices=tuple(OPERATIONS), help="operation")
    parser.add_argument("--kernels", help="default, here and below: all of them")
    parser.add_argument("--widths")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--options")
    parser.add_argument("--on", type=int, default=HOPPER, choices=tuple(SHARED), help="architecture")
    parser.add_argument("--json", action="store_true", help="a list on stdout; the table on stderr")
    chosen = parser.parse_args()
    of = OPERATIONS[chosen.of]
    jobs = [
        (kernel, kind, width, options, chosen.on)
        for kernel in (chosen.kernels.split(",") if chosen.kernels else of.kernels)
        for kind in chosen.types.split(",")
        for width in (map(int, chosen.widths.split(",")) if chosen.widths else of.widths)
        for options in (chosen.options.split(",") if chosen.options else of.options)
    ]
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(compile_kernel, jobs))
    lines = [[str(value) for value in dataclasses.astuple(row)] for row in rows]
    out = table([field.name for field in dataclasses.fields(Compiled)], lines)
    print(f"triton {triton.__version__}, sm_{chosen.on}\n{out}", file=sys.stderr if chosen.json else sys.stdout)
    if chosen.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
