"""The device of this process: what it can do at most, and what has been used of it."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

TENSOR_FLOPS = {
    "H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "H100": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float16": 362e12, "float32": 91.6e12},
    "RTX 4090": {"bfloat16": 165e12, "float16": 165e12, "float32": 82.6e12},
}
"""Dense FLOP/s by the vendor's data sheets (without sparsity), for devices whose name contains the key."""


MALLOPT_TRIM_THRESHOLD, MALLOPT_TOP_PAD, MALLOPT_MMAP_MAX = -1, -2, -4  # glibc, malloc.h
HEAP_STEP = 1 << 26  # bytes by which the heap grows


def pick_device() -> torch.device:
    """The GPU of this process if there is one; else the CPU, which from now on keeps the memory that it frees."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    keep_freed_memory()
    return torch.device("cpu")


def keep_freed_memory() -> bool:
    """Whether from now on freed memory stays with this process for its next allocation; only glibc knows how.

    By default large tensors are mapped anew each time, and the system clears them page by page: 145,000 page faults,
    and a tenth of the time of a pass of Mega at 16,384 tokens; more where a virtual machine makes them dear.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    wanted = ((MALLOPT_MMAP_MAX, 0), (MALLOPT_TRIM_THRESHOLD, -1), (MALLOPT_TOP_PAD, HEAP_STEP))
    return all([mallopt(*each) == 1 for each in wanted])


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s that `device` reaches at most at `dtype`; None where no data sheet says (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops[dtype] for key, flops in TENSOR_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held (GPU: that torch has allocated there)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`, about; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
