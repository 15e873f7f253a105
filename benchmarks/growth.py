"""Step time against sequence length at equal tokens per step: all-local, local + dense, dense.

    python benchmarks/growth.py [--lengths 1024 ... 16384] [--json FILE]

The model is that of configs/enwik8/local.yaml, on random bytes; a step is forward, backward and update.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from report import alternated, publish

from lmtrain.config import load
from lmtrain.setup import build_engine, build_model

PATTERNS = {"local": "near", "local + dense": "near near far", "dense": "far"}


def step(pattern: str, length: int, tokens: int, layers: int) -> Callable[[], object]:
    """A function that trains one step on `tokens` random bytes in sequences of `length`."""
    config = load(
        "enwik8/local",
        [
            "model.mixers.far={kind: dense, heads: 4}",
            f"model.pattern={pattern}",
            f"model.layers={layers}",
            f"data.seq_len={length}",
            f"train.batch_tokens={tokens}",
        ],
    )
    device = torch.device("cpu")
    engine = build_engine(config, build_model(config, device), device)
    text = torch.randint(256, (tokens // length, length + 1))

    def run() -> None:
        engine.backward(engine.forward_loss(text[:, :-1], text[:, 1:], None, tokens, seed=0))
        engine.step(1e-3)

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--tokens", type=int, default=16384, help="per step")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="where to keep the numbers")
    arguments = parser.parse_args()
    rows = []
    runs = {
        (name, length): step(pattern, length, arguments.tokens, arguments.layers)
        for name, pattern in PATTERNS.items()
        for length in arguments.lengths
    }
    seconds = alternated(runs, arguments.repeats)
    for name in PATTERNS:
        first = seconds[name, arguments.lengths[0]]
        times = {f"T={length}": seconds[name, length] for length in arguments.lengths}
        rows.append({"pattern": name, **times, "growth": seconds[name, arguments.lengths[-1]] / first})
    print(f"median seconds per step of {arguments.tokens} tokens, {arguments.layers} layers")
    publish(rows, arguments.json)


if __name__ == "__main__":
    main()
