"""What safe checkpoints cost, and how long a run takes to stop: python benchmarks/saving.py [--json FILE]

Seconds to write the same float32 tensors: by torch.save and by safetensors, as they are and followed by fsync, and by
ours, which hashes every byte, syncs every file and folder, and reads all of it back; two parts of that alone. In turns
of random order, on the disk of --folder, each into an empty folder. CPU seconds are those of the process, system
included: they hold on a busy machine, too.

Seconds from SIGTERM to the end of the process, at random moments of each phase of the run `demo`: saved where it stood.
Before it has opened its folder there is nothing to save, and it ends at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from report import publish_all

from data.disk import sync_file
from launch.cli import STOPPED
from lmtrain import checkpoint
from lmtrain.run import read_metrics

SLICE = 4_000_000  # numbers in a tensor

PHASES: dict[str, list[str]] = {
    "start": [],
    "preparation of data": [],
    "step": ["eval.every=0"],
    "evaluation": ["eval.every=1", "eval.tokens=1000000"],
    "save": ["checkpoint.every=1", "eval.every=0", "model.dim=512", "data.seq_len=128", "train.batch_tokens=128"],
}
"""What makes the run spend most of its time there."""


def costs(folder: Path, gigabytes: float, repeats: int, rng: Random) -> list[dict[str, Any]]:
    """A row for each way to save: seconds per GB, median, least and most."""
    count = max(3, round(gigabytes * 1e9 / 4 / SLICE) // 3 * 3)
    tensors = {f"{index:03}": torch.randn(SLICE) for index in range(count)}
    third = count // 3  # parameters; the rest are their two moments
    groups = {"model": dict(list(tensors.items())[:third]), "optimizer": dict(list(tensors.items())[third:])}
    size = 4 * SLICE * count / 1e9
    place, kept = folder / "new", checkpoint.save(folder / "kept", 1, groups, {})

    def synced(write: Callable[[], Any]) -> None:
        write()
        with open(place / "plain", "rb") as file:
            sync_file(file)

    def by_torch() -> None:
        torch.save(tensors, place / "plain")

    def by_safetensors() -> None:
        safetensors.torch.save_file(tensors, place / "plain")

    runs: dict[str, Callable[[], Any]] = {
        "hashing alone": lambda: [hashlib.sha256(one.numpy()) for one in tensors.values()],
        "reading back and hashing alone": lambda: checkpoint.verify(kept),
        "`torch.save`": by_torch,
        "`torch.save`, fsync": lambda: synced(by_torch),
        "`safetensors.torch.save_file`": by_safetensors,
        "`safetensors.torch.save_file`, fsync": lambda: synced(by_safetensors),
        "a checkpoint: hashed, synced, read back": lambda: checkpoint.save(place, 1, groups, {}),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in rng.sample(list(runs.items()), len(runs)):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            os.sync()  # nobody waits for what another one wrote
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if number:  # the first round is a warm-up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = []
    for name, taken in seconds.items():
        walls, cpus = zip(*taken)
        figures = {
            "seconds per GB": statistics.median(walls) / size,
            "least": min(walls) / size,
            "most": max(walls) / size,
            "CPU seconds per GB": statistics.median(cpus) / size,
        }
        rows.append({"what": name, "GB": round(size, 3), "times": repeats, **figures})
        print(rows[-1], flush=True)
    return rows


def stops(folder: Path, times: int, rng: Random) -> list[dict[str, Any]]:
    """A row for each phase: seconds from SIGTERM to the end."""
    with started(folder, Random(0), *PHASES["step"]) as process:  # how long a start and the preparation take
        began = time.monotonic()
        wait_until(process, lambda: (folder / "run/events.jsonl").exists())
        start_seconds = time.monotonic() - began
        wait_until(process, lambda: bool(read_metrics(folder / "run")))
        preparation_seconds = time.monotonic() - began - start_seconds
    rows = []
    for phase, settings in PHASES.items():
        seconds = []
        for _ in range(times):
            with started(folder, rng, *settings) as process:
                if phase == "start":
                    time.sleep(rng.uniform(0, start_seconds))
                elif phase == "preparation of data":
                    wait_until(process, lambda: (folder / "run/events.jsonl").exists())
                    time.sleep(rng.uniform(0, preparation_seconds))
                else:
                    wait_until(process, lambda: bool(read_metrics(folder / "run")))
                    time.sleep(rng.uniform(0, 2.0))
                seconds.append(time_to_stop(process))
        walls, cpus = zip(*seconds)
        figures = {"median (s)": statistics.median(walls), "longest (s)": max(walls), "longest (CPU s)": max(cpus)}
        rows.append({"phase": phase, "times": times, **figures})
        print(rows[-1], flush=True)
    return rows


def time_to_stop(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Seconds, and those of its CPU, from SIGTERM to the end of a run."""
    asked, cpu = time.monotonic(), cpu_seconds(process.pid)
    process.terminate()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (STOPPED, -signal.SIGTERM), process.returncode
    return time.monotonic() - asked, used.ru_utime + used.ru_stime - cpu


def cpu_seconds(pid: int) -> float:
    """That a process has used so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(folder: Path, rng: Random, *settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """The run `demo` from its beginning, without prepared tokens; killed at the end, if it still lives."""
    for name in ("run", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    places = [f"run.dir={folder}/run", f"data.cache={folder}/cache"]
    command = [sys.executable, "-m", "lmtrain", "train", "demo", "train.threads=1", "log.every=1", *places, *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode}"
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=7, help="of each save")
    parser.add_argument("--times", type=int, default=10, help="stops in each phase")
    parser.add_argument("--folder", help="where to write; default: the system's folder for temporary files")
    parser.add_argument("--json", metavar="FILE", help="keep the numbers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        tables = {"saves": costs(Path(folder), arguments.gigabytes, arguments.repeats, Random(0))}
        tables["stops"] = stops(Path(folder), arguments.times, Random(0))
    publish_all(tables, arguments.json)


if __name__ == "__main__":
    main()
