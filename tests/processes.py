"""Processes for tests: commands, which end with their test; ranks that talk through gloo, whose stacks show a hang."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SECONDS = 300.0  # for the slowest and busiest machine; what hangs, hangs for ever

_begun: list[subprocess.Popen[str]] = []


def begin(command: Sequence[str], **how: Any) -> subprocess.Popen[str]:
    """A command in a process of its own, which ends at the latest with the test. how: as of `subprocess.Popen`."""
    _begun.append(subprocess.Popen(command, text=True, **how))
    return _begun[-1]


def end_all() -> None:
    """No process that a test began outlives it; a launcher may end its own first."""
    while _begun:
        process = _begun.pop()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until(true: Callable[[], object], seconds: float = SECONDS) -> None:
    """AssertionError if it does not become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def run_ranks(
    ranks: int, work: Callable[..., Any], *arguments: Any, sequence: int = 1, seconds: float = SECONDS
) -> list:
    """What `work(world, *arguments)` returned on each of the ranks, in their order.

    work: a function of a module; what it takes and returns can be pickled, tensors too. AssertionError with the
    traceback of each rank that failed, or with the stacks of those that were still at work when the time was over.
    """
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(ranks):
            end, theirs = context.Pipe(duplex=False)
            job = (rank, ranks, sequence, folder, theirs, work, arguments)
            process = context.Process(target=_rank, args=job, daemon=True)
            process.start()
            theirs.close()
            ends.append(end)
            processes.append(process)
        try:
            return _results(ends, folder, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def started_ranks(ranks: int, folder: Path, work: Callable[..., int], *arguments: Any) -> Iterator[list[BaseProcess]]:
    """Processes that a launcher would have started, each of which ends with what `work(*arguments)` returns.

    They find each other as under torchrun; what one writes to stderr is in `folder/RANK.err`. Whatever still lives at
    the end is killed.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = _server()
    processes = []
    for rank in range(ranks):
        job = (rank, ranks, store.port, str(folder), work, arguments)
        processes.append(context.Process(target=_started, args=job, daemon=True))
        processes[-1].start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def exit_codes(processes: list[BaseProcess], seconds: float = SECONDS) -> list[int | None]:
    """How they ended, None for those that did not within `seconds`; -N: by signal N."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def _started(rank: int, ranks: int, port: int, folder: str, work: Callable[..., int], arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(f"{folder}/{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.exit(work(*arguments))


def _server() -> Any:
    """It imports torch once; each rank is its fork, made before torch has any thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "lmtrain.train", "tests.processes"])
    return context


def _results(ends: list[Connection], folder: str, seconds: float) -> list:
    deadline = time.monotonic() + seconds
    told: dict[int, tuple[str, Any]] = {}
    rank_of = {end: rank for rank, end in enumerate(ends)}
    while len(told) < len(ends) and not any(how == "failed" for how, _ in told.values()):
        ready = wait([end for end in ends if rank_of[end] not in told], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for end in ready:
            assert isinstance(end, Connection)
            try:
                told[rank_of[end]] = pickle.loads(end.recv_bytes())
            except EOFError:
                told[rank_of[end]] = ("failed", "it ended without a word")
    wrong = [f"rank {rank}: {said}" for rank, (how, said) in told.items() if how == "failed"]
    silent = sorted(set(range(len(ends))) - set(told))
    if silent and not wrong:
        wrong = [f"rank {rank} still at work:\n{_stack(folder, rank)}" for rank in silent]
    assert not wrong, "\n".join(wrong)
    return [told[rank][1] for rank in range(len(ends))]


def _stack(folder: str, rank: int) -> str:
    pid = int((Path(folder) / f"{rank}.pid").read_text())
    os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    return (Path(folder) / f"{rank}.stack").read_text()


def _rank(
    rank: int, ranks: int, sequence: int, folder: str, end: Connection, work: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    import torch
    import torch.distributed as dist

    from parallel.world import join

    torch.set_num_threads(1)
    with open(Path(folder) / f"{rank}.stack", "w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
        (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
        with join(sequence, store=dist.FileStore(f"{folder}/store", ranks)) as world:
            try:
                told = ("done", work(world, *arguments))
            except BaseException:
                told = ("failed", traceback.format_exc())
            # Before the others notice that somebody left. By value: shared tensors would end with this process.
            end.send_bytes(pickle.dumps(told))
            world.barrier()
