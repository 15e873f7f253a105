"""Every kernel in every configuration as machine code: no spills, products of warpgroups, room in shared memory."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from attention.kernels.configs import ENVIRONMENT, HOPPER, OTHER, SHARED
from tests.documents import ROOT

STACK = {"bfloat16": 0, "float16": 0, "float32": 32}  # bytes of spills; float32 has no tensor cores to starve
STACK_OTHER = 48  # the assembler spills a little itself, to have more programs at a time
WARPGROUP_ROWS = 64
IN_EVERY_RUN = ("plain", "bias", "bias and gate")
OPTIONS = (*IN_EVERY_RUN, "gate")

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="needs the compiler that Triton brings for Linux on x86-64 and arm64",
)


@pytest.fixture
def cache(pytestconfig: pytest.Config) -> Path:
    """Of compiled kernels, kept between runs: minutes the first time, then seconds."""
    return pytestconfig.cache.mkdir("triton")


def compile_all(
    types: str, cache: Path, *path: str, of: str = "attend", options: Sequence[str] = OPTIONS, on: int = HOPPER
) -> list[dict]:
    """Rows of `compiled.py`, run where nothing is interpreted."""
    ours = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", ENVIRONMENT)}
    environment = ours | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "tests.attention.kernels.compiled", "--json", "--types", types]
    command += ["--of", of, "--options", ",".join(options), "--on", str(on)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return json.loads(done.stdout)


def faults(rows: list[dict], on: int = HOPPER) -> list[str]:
    """What is wrong with each row, in words."""
    found = []
    for row in rows:
        name = f"{row['kernel']}, {row['type']}, width {row['width']}, {row['options']}, {row['tile']}"
        no_products = row["kernel"] == "attend_sum_segments" or row["kernel"].startswith("scan")
        stack = STACK[row["type"]] if on == HOPPER else STACK_OTHER
        if row["kernel"].startswith("scan"):
            stack = 0
        if row["stack"] > stack:
            found.append(f"{name}: {row['stack']} bytes of spills, allowed {stack}")
        if row["shared"] > SHARED[on]:
            found.append(f"{name}: {row['shared']} bytes of shared memory, there are {SHARED[on]}")
        if no_products or row["type"] == "float32":
            continue
        warpgroups, warps = row["wgmma"], row["mma"]
        sides = [int(side) for side in row["tile"].split()[0].split("x")]
        if on == HOPPER and max(sides) >= WARPGROUP_ROWS and (warpgroups == 0 or warps > 0):
            found.append(f"{name}: {warpgroups} products of warpgroups and {warps} of warps; all should be the first")
        if warpgroups + warps == 0:
            found.append(f"{name}: no tensor cores")
        if row["width"] >= 64 and row["wide_loads"] == 0:
            found.append(f"{name}: no loads of 16 bytes past the registers")
    return found


def test_hopper(cache: Path) -> None:
    rows = compile_all("bfloat16,float32", cache, options=IN_EVERY_RUN)
    assert len(rows) == 4 * 2 * 5 * 3
    assert not faults(rows), "\n".join(faults(rows))


def test_the_scan_on_hopper(cache: Path) -> None:
    rows = compile_all("bfloat16", cache, of="scan", options=("resets",))
    assert len(rows) == 6 * 5
    assert not faults(rows), "\n".join(faults(rows))


@pytest.mark.slow
@pytest.mark.parametrize("on", [HOPPER, OTHER])
def test_the_scan_elsewhere_and_in_other_types(cache: Path, on: int) -> None:
    rows = compile_all("bfloat16,float16,float32", cache, of="scan", options=("plain", "resets"), on=on)
    assert not faults(rows, on), "\n".join(faults(rows, on))


@pytest.mark.slow
def test_hopper_in_float16_and_with_a_gate_alone(cache: Path) -> None:
    rows = compile_all("float16", cache) + compile_all("bfloat16", cache, options=("gate",))
    assert not faults(rows), "\n".join(faults(rows))


@pytest.mark.slow
def test_other_devices(cache: Path) -> None:
    rows = compile_all("bfloat16,float32", cache, on=OTHER)
    assert not faults(rows, OTHER), "\n".join(faults(rows, OTHER))


@pytest.mark.slow
def test_the_oldest_triton(tmp_path: Path, cache: Path) -> None:
    """GPU machines often carry an older Triton than the one that is pinned here."""
    beside = tmp_path / "triton-3.6"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(beside), "triton==3.6.0"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs triton 3.6.0 from the package index: {done.stderr.strip().splitlines()[-1]}")
    for on in (HOPPER, OTHER):
        rows = compile_all("bfloat16", cache, str(beside), on=on)
        assert not faults(rows, on), "\n".join(faults(rows, on))


def test_faults_are_found() -> None:
    good = {"kernel": "attend_forward", "type": "bfloat16", "width": 64, "options": "plain", "tile": "128x64 w8 s3 l2"}
    good |= {"registers": 200, "stack": 0, "shared": 1000, "wgmma": 8, "mma": 0, "wide_loads": 8}
    assert faults([good]) == []
    bad = [{"stack": 8}, {"shared": SHARED[HOPPER] + 1}, {"wgmma": 0, "mma": 64}, {"mma": 1}, {"wide_loads": 0}]
    assert [len(faults([{**good, **change}])) for change in bad] == [1] * len(bad)
    scan = {**good, "kernel": "scan_ends", "wgmma": 0, "wide_loads": 0}
    assert faults([scan]) == []
    assert [len(faults([{**scan, "stack": 8}], on)) for on in (HOPPER, OTHER)] == [1, 1]
    ampere = {**good, "wgmma": 0, "mma": 64}
    assert faults([ampere], OTHER) == []
    bad = [{"stack": STACK_OTHER + 8}, {"shared": SHARED[OTHER] + 1}, {"mma": 0}]
    assert [len(faults([{**ampere, **change}], OTHER)) for change in bad] == [1] * len(bad)
