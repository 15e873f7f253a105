"""Before anything imports a kernel: without a GPU, Triton's kernels run in its interpreter, in this whole process."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
