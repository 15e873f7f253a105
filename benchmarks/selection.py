"""Mixers that choose by content against dense attention: speed-up, growth with length, the largest tensor of MoSA.

    python benchmarks/selection.py [--length 8192] [--lengths 4096 .. 32768] [--repeats 5] [--threads 2] [--json FILE]

Forward and backward of a whole mixer, float32, batch 1, dim 256, heads of 64; medians of alternated repeats in one
process. `speed-up` is over dense attention: of as many heads, key heads too, and of the 4 that fill dim. `growth` is
the slope of log time over log length, a least-squares fit: 1 is linear, 2 quadratic. MoH is compared with all of its
heads computed for all tokens. The largest tensor is that of MoSA with heads enough that they keep 8 of each token,
beside what it would be if the tokens of all heads existed together.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from report import alternated, publish_all

from attention.mixer import Mixer, build
from lmtrain.bench.measure import largest_bytes

DIM, WIDTH = 256, 64
MOSA: dict[str, Any] = {"heads": 16, "head_dim": WIDTH, "keep": 256}
SPARSEK: dict[str, Any] = {"heads": 4, "head_dim": WIDTH, "keep": 256, "window": 128}
CHOOSING: dict[str, tuple[str, dict[str, Any]]] = {
    "mosa": ("mosa", MOSA),
    "routing": ("routing", {"heads": 4, "head_dim": WIDTH, "clusters": 8, "window": 256}),
    "sparsek": ("sparsek", SPARSEK),
    "sparsek, one key head": ("sparsek", {**SPARSEK, "kv_heads": 1}),
}
MOH: dict[str, Any] = {"heads": 8, "head_dim": WIDTH, "shared_heads": 2}
ACTIVE = {"half": 2, "all": 6}  # of the six routed heads of MoH: in all 4 of 8 heads serve a token, or 8 of 8


def trained(kind: str, length: int, **settings: Any) -> Callable[[], object]:
    """A function that runs forward and backward on the same random tokens."""
    torch.manual_seed(0)
    mixer: Mixer = build(kind, DIM, **settings)
    x = torch.randn(1, length, DIM, requires_grad=True)
    dout = torch.randn(1, length, DIM)
    inputs = [x, *mixer.parameters()]
    return lambda: torch.autograd.grad(mixer(x).y, inputs, dout, allow_unused=True)


def speed_rows(length: int, repeats: int) -> list[dict[str, Any]]:
    """Each mixer against dense attention of as many heads, and of those that fill dim."""
    runs: dict[Any, Callable[[], object]] = {
        name: trained(kind, length, **settings) for name, (kind, settings) in CHOOSING.items()
    }
    peers = {
        name: [(s["heads"], s.get("kv_heads")), (DIM // WIDTH, s.get("kv_heads"))] for name, (_, s) in CHOOSING.items()
    }
    for heads, kv_heads in sorted({peer for mine in peers.values() for peer in mine}, key=str):
        runs[heads, kv_heads] = trained("dense", length, heads=heads, kv_heads=kv_heads, head_dim=WIDTH)
    runs |= {name: trained("moh", length, **MOH, active_heads=active) for name, active in ACTIVE.items()}
    seconds = alternated(runs, repeats)
    rows = [
        {
            "mixer": name,
            "ms": 1e3 * seconds[name],
            "against": f"dense, {peer[0]} heads" + (f", {peer[1]} key head" if peer[1] else ""),
            "speed-up": seconds[peer] / seconds[name],
        }
        for name, mine in peers.items()
        for peer in dict.fromkeys(mine)
    ]
    share = {"against": "all of its 8 heads", "speed-up": seconds["all"] / seconds["half"]}
    return [*rows, {"mixer": "moh, 4 of 8 heads", "ms": 1e3 * seconds["half"], **share}]


def growth_rows(lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """Time of each mixer at each length, and how it grows."""
    rows = []
    for name, (kind, settings) in CHOOSING.items():
        seconds = alternated({length: trained(kind, length, **settings) for length in lengths}, repeats)
        times = {f"T={length} ms": 1e3 * seconds[length] for length in lengths}
        rows.append({"mixer": name, **times, "growth": slope(seconds)})
    return rows


def slope(seconds: dict[int, float]) -> float:
    """Of log seconds over log length, by least squares."""
    x, y = [math.log(length) for length in seconds], [math.log(s) for s in seconds.values()]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)


def memory_row(length: int, keep: int = 256, width: int = 8) -> dict[str, Any]:
    """Numbers in the largest tensor of a step of MoSA; narrow heads, since queries, keys and values are needed."""
    heads = 8 * length // keep
    run = trained("mosa", length, heads=heads, head_dim=width, keep=keep)
    return {
        "mixer": f"mosa, {heads} heads of {width}, keep {keep}",
        "largest tensor": largest_bytes(run) // 4,
        "heads x keep x dim": heads * keep * DIM,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens, against dense attention")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="of the growth")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="where to keep the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tables = {
        "speed": speed_rows(arguments.length, arguments.repeats),
        "growth": growth_rows(arguments.lengths, max(1, arguments.repeats - 2)),
        "memory": [memory_row(arguments.length)],
    }
    publish_all(tables, arguments.json)


if __name__ == "__main__":
    main()
