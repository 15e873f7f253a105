"""What the device can do at most, and what has been used of it."""

from __future__ import annotations

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
