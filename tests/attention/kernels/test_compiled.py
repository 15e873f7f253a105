"""Every kernel in every configuration as code for Hopper: no spills, products of warpgroups, room in shared memory."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT

SHARED = 227 * 1024  # bytes that a program may have on sm_90
STACK = {"bfloat16": 0, "float16": 0, "float32": 32}  # bytes of spills; float32 has no tensor cores to starve
WARPGROUP_ROWS = 64

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="needs the compiler that Triton brings for Linux on x86-64 and arm64",
)


def compile_all(types: str, cache: Path, *path: str) -> list[dict]:
    """Rows of `compiled.py`, run where nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "tests.attention.kernels.compiled", "--json", "--types", types]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return json.loads(done.stdout)


def faults(rows: list[dict]) -> list[str]:
    """What is wrong with each row, in words."""
    found = []
    for row in rows:
        name = f"{row['kernel']}, {row['type']}, width {row['width']}, {row['options']}, {row['tile']}"
        if row["stack"] > STACK[row["type"]]:
            found.append(f"{name}: {row['stack']} bytes of spills, allowed {STACK[row['type']]}")
        if row["shared"] > SHARED:
            found.append(f"{name}: {row['shared']} bytes of shared memory, there are {SHARED}")
        sides = [int(side) for side in row["tile"].split()[0].split("x")]
        multiplies = row["kernel"] != "attend_sum_segments" and row["type"] != "float32"
        if multiplies and max(sides) >= WARPGROUP_ROWS and (row["wgmma"] == 0 or row["mma"] > 0):
            found.append(
                f"{name}: {row['wgmma']} products of warpgroups and {row['mma']} of warps; all should be the first"
            )
        if multiplies and row["width"] >= 64 and row["wide_loads"] == 0:
            found.append(f"{name}: no loads of 16 bytes past the registers")
    return found


def test_hopper(tmp_path: Path) -> None:
    rows = compile_all("bfloat16,float32", tmp_path)
    assert len(rows) == 4 * 2 * 5 * 3
    assert not faults(rows), "\n".join(faults(rows))


@pytest.mark.slow
def test_hopper_in_float16(tmp_path: Path) -> None:
    rows = compile_all("float16", tmp_path)
    assert not faults(rows), "\n".join(faults(rows))


@pytest.mark.slow
def test_hopper_with_the_oldest_triton(tmp_path: Path) -> None:
    """GPU machines often carry an older Triton than the one that is pinned here."""
    beside = tmp_path / "triton-3.6"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(beside), "triton==3.6.0"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs triton 3.6.0 from the package index: {done.stderr.strip().splitlines()[-1]}")
    rows = compile_all("bfloat16", tmp_path / "cache", str(beside))
    assert not faults(rows), "\n".join(faults(rows))


def test_faults_are_found() -> None:
    good = {"kernel": "attend_forward", "type": "bfloat16", "width": 64, "options": "plain", "tile": "128x64 w8 s3 l2"}
    good |= {"registers": 200, "stack": 0, "shared": 1000, "wgmma": 8, "mma": 0, "wide_loads": 8}
    assert faults([good]) == []
    bad = [{"stack": 8}, {"shared": SHARED + 1}, {"wgmma": 0, "mma": 64}, {"mma": 1}, {"wide_loads": 0}]
    assert [len(faults([{**good, **change}])) for change in bad] == [1] * len(bad)
