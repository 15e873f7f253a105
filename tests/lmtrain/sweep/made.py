"""Results of sweeps that nobody ran: losses follow a law that the test knows."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmtrain.sweep.result import RunFailure, RunResult

Loss = Callable[[float, float, float, int], float]
"""(N, D, rho, seed) -> nats per token"""


def hoffmann(N: float, D: float, rho: float = 1.0, seed: int = 0) -> float:
    """E = 1.69, A = 406.4, B = 410.7, a = 0.3392, b = 0.2849 (Hoffmann et al. 2022, appendix D.3)."""
    return 1.69 + 406.4 * N**-0.3392 + 410.7 * D**-0.2849


def a_run(**changes: Any) -> RunResult:
    """A finished run of 1 M parameters and 10 M tokens, one byte each; flops follow tokens unless given."""
    base = RunResult(
        name="run", hash="0" * 8, axes={}, mixer="dense", seed=1, parameters=10**6, parameters_total=2 * 10**6,
        tokens=10**7, flops=0.0, flops_per_token=2e6, pairs=512.5, loss=2.0, bits_per_byte=2.0 / math.log(2),
        sparsity=None, strict=True, seconds=60.0, tokens_per_second=1e5, peak_memory=10**9,
        state_bytes={"1024": 1e5, "65536": 5e6}, parent=None, group="run", scoring="one-pass",
        command="lmtrain train demo", environment={"processor": "a chip", "versions": {"torch": "2"}},
    )  # fmt: skip
    run = replace(base, **{"group": changes.get("name", "run"), **changes})
    return run if "flops" in changes else replace(run, flops=3 * run.flops_per_token * run.tokens)


def a_failure(**changes: Any) -> RunFailure:
    """A run that was given up."""
    base = RunFailure("broken", "f" * 8, {"mixer": "dense"}, 2, "out of memory", 1, "broken/log.txt")
    return replace(base, **changes)


def a_grid(
    *,
    mixers: Sequence[str] = ("dense",),
    sizes: Sequence[int] = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8),
    tokens: Sequence[int] = (10**8, 3 * 10**8, 10**9, 3 * 10**9),
    sparsities: Sequence[float | None] = (None,),
    seeds: Sequence[int] = (1,),
    loss: Loss = hoffmann,
) -> list[RunResult]:
    """A run for each combination, with 6 N FLOPs a token; sizes are axes by number, as sweeps have them."""
    runs = []
    for mixer, (size, N), D, rho, seed in itertools.product(mixers, enumerate(sizes), tokens, sparsities, seeds):
        axes = {"mixer": mixer, "size": f"s{size}", "tokens": D, "seed": seed} | ({"keep": 1024 / rho} if rho else {})
        nats = loss(N, D, rho or 1.0, seed)
        name = "-".join(str(value) for value in axes.values())
        sizes_of = {"parameters": N, "tokens": D, "sparsity": rho, "flops_per_token": 2.0 * N, "seed": seed}
        losses = {"loss": nats, "bits_per_byte": nats / math.log(2)}
        runs.append(a_run(name=name, axes=axes, mixer=mixer, **sizes_of, **losses))
    return runs


def written(folder: Path, runs: Sequence[RunResult], failures: Sequence[RunFailure] = ()) -> Path:
    """The folder of a sweep that holds them."""
    for number, record in enumerate((*runs, *failures)):
        place = folder / f"{record.name.replace('/', '_')[:40]}-{number}"
        place.mkdir(parents=True)
        record.write(place)
    return folder
