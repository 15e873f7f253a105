"""What a run ran on: command line, versions, commit, hardware, threads. For `environment.json`."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("lmtrain", "torch", "triton", "numpy", "deepspeed", "tokenizers", "datasets", "safetensors")
# Only these: an environment may hold secrets.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "LMTRAIN_CACHE",
    "LMTRAIN_DATA",
    "LMTRAIN_FAULT",
    "LMTRAIN_NATIVE",
    "LOCAL_RANK",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "SLURM_JOB_ID",
    "TRITON_INTERPRET",
    "WORLD_SIZE",
)


def describe() -> dict[str, Any]:
    """The environment of this process, as JSON; `memory` in bytes, `git` None unless the code lies in its
    checkout.
    """
    return {
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := package_version(name))},
        "git": _git(Path(__file__).resolve()),
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def package_version(name: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def processor() -> str:
    """The name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _git(file: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that tracks `file`; an installed copy may lie in another's."""
    if _run_git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    changes = _run_git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _run_git(file.parent, "rev-parse", "HEAD"), "dirty": changes != ""}


def _run_git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
