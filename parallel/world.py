"""The processes that train together: who each one is, and how all of them agree.

A launcher (torchrun, deepspeed, Slurm) says in the environment who is who: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT. Without one a process is alone, and nothing here talks to anybody.

`sequence` adjacent ranks share each row of a batch, every one a slice of its tokens; the others share the rows. So
rank = data_rank x sequence + sequence_rank.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOOPBACK = "127.0.0.1"
CPU = torch.device("cpu")
MESSAGE_BYTES = 64 << 20
START_SECONDS = 600.0


@dataclass
class Calls:
    """How many collectives this process has come to."""

    number: int = 0


@dataclass(frozen=True, eq=False)
class World:
    """One process among those that train together.

    rank, size: of all processes; local_rank: on this machine. sequence: ranks that share a row, with the group in which
    they talk. device: where tensors lie that collectives take. store: a few words that all ranks can read and write,
    without waiting for each other.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    sequence: int = 1
    sequence_group: dist.ProcessGroup | None = None
    device: torch.device = CPU
    store: dist.Store | None = None
    calls: Calls = field(default_factory=Calls)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which rows this process reads."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """Among how many the rows are shared."""
        return self.size // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Which slice of its rows' tokens this process has."""
        return self.rank % self.sequence

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the sum of those of all ranks, in place, the same bits on each of them.

        Those of one dtype travel together, in messages of about MESSAGE_BYTES at most (or one tensor).
        """
        if self.size == 1:
            return
        for some in _messages(tensors):
            self.calls.number += 1
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            dist.all_reduce(flat)
            for tensor, summed in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers: so all agree on a flag that one of them has raised."""
        if self.size == 1:
            return number
        self.calls.number += 1
        told = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, in their order; anything that JSON can say."""
        if self.size == 1:
            return [value]
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        longest = self.largest(len(text))
        filled = torch.full((longest,), ord(" "), dtype=torch.uint8, device=self.device)
        filled[: len(text)] = text
        told = [torch.empty_like(filled) for _ in range(self.size)]
        dist.all_gather(told, filled)
        return [json.loads(bytes(each.tolist())) for each in told]

    def to_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of all ranks on the first one, where each rank has names of its own; elsewhere just `tensors`."""
        collected = dict(tensors)
        forms = self.gather([(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()])
        for rank in range(1, self.size):
            for name, dtype, shape in forms[rank]:
                if self.is_first:
                    collected[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                    _bytes_of(collected[name], dist.recv, rank)
                elif self.rank == rank:
                    _bytes_of(tensors[name].to(self.device).contiguous(), dist.send, 0)
        return collected

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self.largest(0)


def _bytes_of(tensor: Tensor, send_or_receive: Callable[[Tensor, int], Any], rank: int) -> None:
    """As bytes, for not every dtype travels."""
    if tensor.numel():
        send_or_receive(tensor.reshape(-1).view(torch.uint8), rank)


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one dtype that are not too large: what is sent is copied."""
    alike: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(tensor.dtype, []).append(tensor)
    for some in alike.values():
        message: list[Tensor] = []
        size = 0
        for tensor in some:
            if message and size + tensor.nbytes > MESSAGE_BYTES:
                yield message
                message, size = [], 0
            message.append(tensor)
            size += tensor.nbytes
        yield message


ALONE = World()


def launched(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher started; 1 without one."""
    return int(environment.get("WORLD_SIZE", "1"))


@contextmanager
def join(sequence: int = 1, timeout: float = START_SECONDS, store: dist.Store | None = None) -> Iterator[World]:
    """The world of this process, as the environment describes it; left at the end.

    sequence: ranks that share a row; must divide the world (ValueError). timeout: seconds within which all ranks must
    have started (RuntimeError names those that have not). store: where ranks find each other, instead of MASTER_ADDR.
    Collectives have no timeout of their own (a day): see `parallel.watchdog`.
    """
    size = launched()
    if size % sequence:
        raise ValueError(
            f"parallel.sequence: {sequence} ranks share a row, which does not divide the {size} processes started"
        )
    if size == 1:
        yield ALONE
        return
    # Optimizers import it. Once imported in a process group it never lets that go, and then the threads of the group,
    # still there when Python ends, abort the process now and then.
    importlib.import_module("torch._dynamo")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    device = CPU
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    os.environ.setdefault("MASTER_ADDR", LOOPBACK)
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
    _await_all(store, rank, size, timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("groups", store), rank=rank, world_size=size, timeout=timedelta(days=1)
    )
    try:
        group = None
        for first in range(0, size, sequence):  # every rank must make every group
            ranks = list(range(first, first + sequence))
            made = dist.new_group(ranks, timeout=timedelta(days=1)) if sequence > 1 else None
            group = made if rank in ranks else group
        yield World(rank, size, local_rank, sequence, group, device, store)
    finally:
        dist.destroy_process_group()


def _await_all(store: dist.Store, rank: int, size: int, seconds: float) -> None:
    store.set(f"started/{rank}", "")
    try:
        store.wait([f"started/{other}" for other in range(size)], timedelta(seconds=seconds))
    except RuntimeError:
        missing = ", ".join(str(other) for other in range(size) if not store.check([f"started/{other}"]))
        raise RuntimeError(f"of {size} ranks these did not start within {seconds:g} s: {missing}") from None
