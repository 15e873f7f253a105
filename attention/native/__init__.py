"""Kernels for CPUs in C++, compiled for this processor when they are first needed, and kept for the next time.

A compiler that knows OpenMP is all it takes (`CXX`, or c++, g++ or clang++); without one the same operations run in
torch. What is compiled lies in the user's cache, named after the source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
MULTIPLE = 16  # of widths, channels, codes that kernels take: the floats of a register on the widest processor
SWITCH = "LMTRAIN_NATIVE"  # 0: do without


class UnavailableError(Exception):
    """Why there are no kernels: one sentence for the user."""


@cache
def library(name: str) -> ctypes.CDLL:
    """The kernels of `name`.cpp beside this file. UnavailableError if this machine cannot, or shall not."""
    if os.environ.get(SWITCH) == "0":
        raise UnavailableError(f"the C++ kernels are switched off by {SWITCH}=0")
    compiler = _compiler()
    source = HERE / f"{name}.cpp"
    try:
        target = _own_folder() / f"{name}-{_fingerprint(source, compiler)}.so"
        if not target.exists():
            _compile(source, compiler, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError) as error:  # RuntimeError: of a user without a home
        raise UnavailableError(f"the C++ kernels cannot be kept: {error}; set XDG_CACHE_HOME") from error


@cache
def why_not(name: str) -> str | None:
    """What keeps this machine from having the kernels of `name`; None: nothing."""
    try:
        library(name)
    except UnavailableError as error:
        return str(error)
    return None


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Arguments of a kernel: where contiguous tensors begin; None: nowhere. The caller holds them until it returns."""
    assert all(x is None or x.is_contiguous() for x in tensors)
    return [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]


def sizes(*values: int) -> list[ctypes.c_int64]:
    """Arguments of a kernel: whole numbers."""
    return [ctypes.c_int64(value) for value in values]


def folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmtrain" / "native"


def _own_folder() -> Path:
    """That folder, made if missing. What lies there is executed: nobody else may write to it."""
    here = folder()
    here.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = here.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UnavailableError(f"the C++ kernels cannot be kept in {here}: others may write there")
    return here


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    raise UnavailableError(f"the C++ kernels need a compiler: {wanted or 'c++, g++ or clang++'} is not on this machine")


def _fingerprint(source: Path, compiler: str) -> str:
    """Of all that decides what is compiled, the processor's abilities included: a home may be shared by machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    headers = (path.read_text() for path in sorted(HERE.glob("*.h")))
    parts = [*headers, source.read_text(), compiler, version, *FLAGS, _abilities()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _abilities() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return "\n".join(dict.fromkeys(x for x in lines if x.startswith(("flags", "Features", "model name", "CPU part"))))


def _compile(source: Path, compiler: str, target: Path) -> None:
    """By one process at a time, and into place in one step."""
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        with tempfile.TemporaryDirectory(dir=target.parent) as here:
            made = Path(here) / target.name
            command = [compiler, *FLAGS, "-o", str(made), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                first = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr.strip())
                raise UnavailableError(f"the C++ kernels cannot be compiled by {compiler}: {first}")
            made.replace(target)
