"""Memory and time of the loss, forward and backward: chunked linear cross entropy against whole logits.

    python benchmarks/loss_memory.py [--tokens 16384] [--vocabulary 32768] [--dim 256] [--json FILE]

Memory is what a step takes beyond hidden, weight and their gradients, measured twice: the most bytes of live
tensor storage that any operator left behind, and the peak resident set of a process that does nothing else,
which also sees what operators allocate inside.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import alternated, publish
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmtrain.loss import _linear_cross_entropy, default_chunk, linear_cross_entropy

MIB = 2**20


def whole_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What everybody writes first."""
    return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Ours."""
    return linear_cross_entropy(hidden, weight, labels, chunk)[0]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages made under it that are still alive, and their peak.

    `before`: tensors made earlier, whose views are not to be counted.
    """

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lmtrain":
            # Our operator would be one opaque step: run the function behind it, counted inside as well.
            with self:
                out = _linear_cross_entropy._init_fn(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def problem(tokens: int, vocabulary: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, labels."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, dim).requires_grad_()
    weight = (torch.randn(vocabulary, dim) / dim**0.5).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,))


def train_step(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Forward and backward of the mean, into fresh gradients."""
    hidden.grad = weight.grad = None
    (loss(hidden, weight, labels) / len(labels)).backward()


def live_bytes(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> int:
    """Peak of live tensor storage during a step, less the two gradients that stay."""
    hidden.grad = weight.grad = None
    with LiveBytes(hidden, weight, labels) as count:
        train_step(loss, hidden, weight, labels)
    return count.peak - hidden.nbytes - weight.nbytes


def resident_bytes(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> int:
    """Peak resident set of this process during a step, over that before, less the two gradients that stay."""
    train_step(loss, *problem(tokens=8, vocabulary=8, dim=8))  # libraries and thread pools load first
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here; see proc(5)
    before = _status("VmRSS")
    train_step(loss, hidden, weight, labels)
    return _status("VmHWM") - before - hidden.nbytes - weight.nbytes


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes. Not getrusage: its peak is inherited from the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured_alone(name: str, arguments: argparse.Namespace) -> int:
    """`resident_bytes` in a fresh process."""
    sizes = [f"--{key}={getattr(arguments, key)}" for key in ("tokens", "vocabulary", "dim", "threads")]
    command = [sys.executable, __file__, *sizes, "--alone", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def contenders(vocabulary: int) -> dict[str, Callable[..., Tensor]]:
    """Whole logits, and ours in chunks of the default length, a quarter and four times of it."""
    default = default_chunk(vocabulary)
    chunks = [default // 4, default, 4 * default]
    return {"whole": whole_logits} | {f"chunks of {c}": partial(chunked, chunk=c) for c in chunks}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="where to keep the numbers")
    parser.add_argument("--alone", metavar="NAME", help="only print the resident bytes of this one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    losses = contenders(arguments.vocabulary)
    inputs = problem(arguments.tokens, arguments.vocabulary, arguments.dim)
    if arguments.alone:
        print(resident_bytes(losses[arguments.alone], *inputs))
        return
    seconds = alternated({name: partial(train_step, loss, *inputs) for name, loss in losses.items()}, arguments.repeats)
    rows = [
        {
            "logits": name,
            "tokens": arguments.tokens,
            "vocabulary": arguments.vocabulary,
            "dim": arguments.dim,
            "live MiB": live_bytes(loss, *inputs) / MIB,
            "resident MiB": measured_alone(name, arguments) / MIB,
            "seconds": seconds[name],
        }
        for name, loss in losses.items()
    ]
    publish(rows, arguments.json)


if __name__ == "__main__":
    main()
