"""The memory of a process on a CPU."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from lmtrain.hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

anew = faults()
assert keep_freed_memory()
print(anew, min(faults() for _ in range(8)))  # the first ones let the heap grow
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library than glibc, whose memory is left alone"
)
def test_freed_memory_is_not_fetched_from_the_system_again() -> None:
    """Four tensors of 64 MiB, one after another: each is cleared page by page, until freed memory is kept."""
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout.split()
    anew, kept = map(int, said)
    assert kept < 16 < anew
