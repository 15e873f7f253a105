"""Two machines, each a network namespace with an address of its own, train one run under torchrun."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmtrain.run import read_metrics, read_status
from tests.lmtrain import tiny
from tests.processes import SECONDS, begin, wait_until

pytestmark = pytest.mark.slow
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Names of two namespaces, joined by a cable."""
    names = [f"lm{os.getpid()}{end}" for end in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("two nodes need the command ip (iproute2), which is not here")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two nodes need network namespaces, which this machine refuses: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(node: str, rank: int, folder: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meet = [f"--node-rank={rank}", f"--master-addr={ADDRESSES[0]}", "--master-port=29411"]
    train = ["-m", "lmtrain", "train", str(folder / "tiny.yaml"), *tiny.settings(folder), f"run.dir={folder}/{name}"]
    return begin(
        ["ip", "netns", "exec", node, *torchrun, *meet, *train, "train.micro_batch=1", *overrides],
        env={**os.environ, "GLOO_SOCKET_IFNAME": node, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def training(job: subprocess.Popen[str]) -> bool:
    """Whether torchrun's process is at work."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    return job.poll() is None and bool(children.read_text().split())


def test_two_nodes_train_as_one_process(nodes: list[str], tmp_path: Path) -> None:
    tiny.write(tmp_path)
    jobs = [start(node, rank, tmp_path, "two") for rank, node in enumerate(nodes)]
    said = [job.communicate(timeout=SECONDS)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert read_status(tmp_path / "two").state == "done"
    alone = tiny.command(tmp_path, f"run.dir={tmp_path}/one", "train.micro_batch=1")
    assert alone.wait(timeout=SECONDS) == 0, alone.communicate()[0]
    losses, expected = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("two", "one"))
    assert losses == pytest.approx(expected, abs=1e-6)


@pytest.mark.fault(11)
def test_a_cut_cable_ends_both(nodes: list[str], tmp_path: Path) -> None:
    """Nobody waits for ever for a node that has gone away."""
    tiny.write(tmp_path)
    endless = ["train.steps=100000", "eval.every=0", "parallel.timeout=15"]
    jobs = [start(node, rank, tmp_path, "two", *endless) for rank, node in enumerate(nodes)]
    try:
        wait_until(lambda: (tmp_path / "two/metrics.jsonl").exists() and len(read_metrics(tmp_path / "two")) > 3)
        assert all(map(training, jobs))
        ip("-n", nodes[1], "link", "set", nodes[1], "down")
        wait_until(lambda: not any(map(training, jobs)))  # torchrun of the far node may wait longer for its master
        assert jobs[0].wait(timeout=SECONDS) != 0
        assert read_status(tmp_path / "two").state == "failed"
    finally:
        for job in jobs:
            job.kill()
