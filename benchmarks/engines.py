"""Engines on two ranks against one process: largest difference of the losses, and what a step costs beyond the work.

Run: python benchmarks/engines.py [--steps N] [--rounds N] [--json PATH]

Every engine takes the same steps in float32 with one thread per rank: AdamW, clipping, two micro-batches per rank and
step, uneven labels. `difference` is the largest between the losses and those of plain torch in one process, in nats per
token. `ms` is the median step; `overhead` is ms beyond plain torch in one process divided by the ranks, which two ranks
with a core each would need if they did not have to talk. Engines take turns, round by round; on a machine with other
work, or with fewer cores than ranks, read the differences, and compare the times with each other only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from report import publish

from lmtrain.config import ModelConfig, OptimizerConfig
from lmtrain.model import DecoderLM
from lmtrain.optimizer import build_optimizer, torch_adamw
from parallel.deepspeed import DeepSpeedEngine
from parallel.engine import Engine, TorchEngine
from parallel.world import World, join

CPU = torch.device("cpu")
ENGINES = {"torch": 0, "ZeRO 1": 1, "ZeRO 2": 2, "ZeRO 3": 3}
ROWS, LENGTH, VOCABULARY = 8, 128, 256
LR = 1e-3


def main() -> None:
    arguments = parse_arguments()
    told = {ranks: on_ranks(ranks, arguments.steps, arguments.rounds) for ranks in (1, 2)}
    expected, ideal = told[1]["torch"]
    rows = []
    for ranks, engines in told.items():
        for name, (losses, seconds) in engines.items():
            row: dict[str, Any] = {"engine": name, "ranks": ranks}
            row["difference"] = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
            row["ms"] = 1e3 * seconds
            row["overhead"] = 1e3 * (seconds - ideal / ranks)
            rows.append(row)
    publish(rows, arguments.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of each engine in each round")
    parser.add_argument("--rounds", type=int, default=3, help="in which engines take turns")
    parser.add_argument("--json", metavar="PATH", help="keep the table here")
    return parser.parse_args()


def on_ranks(ranks: int, steps: int, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Of each engine the losses, and the median seconds of a step, on the first rank."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, (ranks, steps, rounds, folder), nprocs=ranks)
        return torch.load(f"{folder}/told", weights_only=True)


def run_rank(rank: int, ranks: int, steps: int, rounds: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    with join(store=dist.FileStore(f"{folder}/store", ranks)) as world:
        for _ in range(rounds):
            for name, stage in ENGINES.items():
                with closing(make_engine(stage, world)) as engine:
                    losses[name], times = take_steps(engine, world, steps)
                seconds[name] += times[1:]
    if world.is_first:
        torch.save({name: (losses[name], statistics.median(seconds[name])) for name in ENGINES}, f"{folder}/told")


def make_engine(stage: int, world: World) -> Engine:
    torch.manual_seed(0)
    mixers: dict[str, Any] = {"near": {"kind": "local", "heads": 4, "window": 32}, "far": {"kind": "dense", "heads": 4}}
    config = ModelConfig(dim=256, layers=4, vocab_size=VOCABULARY, mixers=mixers, pattern="near far", tied=True)
    model = DecoderLM(config)
    if not stage:
        return TorchEngine(model, build_optimizer(model, OptimizerConfig()), world=world, device=CPU, clip=1.0)
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    optimizer = torch_adamw(model, OptimizerConfig())
    return DeepSpeedEngine(model, optimizer, world=world, device=CPU, clip=1.0, stage=stage, extra=extra)


def take_steps(engine: Engine, world: World, steps: int) -> tuple[list[float], list[float]]:
    """The loss and the seconds of each step. Rank r reads rows r, r + ranks, .. of each half of the batch."""
    losses, seconds = [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(VOCABULARY // 8, (ROWS, LENGTH + 1), generator=generator)
        tokens, labels = text[:, :-1], text[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.5, ROWS)[:, None]] = -100
        scored = int((labels >= 0).sum())
        began = time.perf_counter()
        for half in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS)):
            mine = (part[half][world.rank :: world.size] for part in (tokens, labels))
            engine.backward(engine.forward_loss(*mine, None, scored, seed=step))
        losses.append(engine.step(LR).loss)
        seconds.append(time.perf_counter() - began)
    return losses, seconds


if __name__ == "__main__":
    main()
