"""What holds for all tests. Without a GPU, Triton's kernels run in its interpreter, in this whole process."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.processes import end_all

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small products: threads cost more than they give, and much more beside other work on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    end_all()
