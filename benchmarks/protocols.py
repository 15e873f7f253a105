"""What a protocol costs and says: sliding windows of several strides beside the state carried along.

    python benchmarks/protocols.py PATH [--json FILE]

PATH: enwik8 or a prefix of it. Two models of two layers of width 128 are trained at T = 512 for 300 steps of 4,096
bytes, `local` with a window of 128 and `dense`; each scores the whole test split under every protocol. Bytes per second
are medians of three alternated runs over its first 65,536 bytes. Runs are kept in a folder; a second call only scores.

Carried and sliding are two protocols: a key carried on has seen more than a window holds. The layers of `local`
together reach 2 x 127 = 254 bytes back, so windows of 512 that advance by 256 hold all of it, and both numbers are
equal; those that advance by 512 do not. `dense` reaches as far as it is let, so they differ.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from report import alternated, lmtrain, publish

from lmtrain.evaluation.evaluate import Evaluation, evaluate, evaluate_carried
from lmtrain.restore import open_run
from lmtrain.setup import read_split

SETTINGS = [
    *("data.seq_len=512", "train.steps=300", "train.batch_tokens=4096", "optimizer.lr=2e-3", "model.dim=128"),
    *("model.layers=2", "eval.every=0", "eval.tokens=4096", "checkpoint.every=100", "checkpoint.keep=1"),
    "model.pattern=far",
]
MODELS = {
    "local": "model.mixers.far={kind: local, heads: 2, window: 128}",
    "dense": "model.mixers.far={kind: dense, heads: 2}",
}
WINDOWS = [(512, 512), (512, 256), (512, 64), (2048, 512)]
CARRY = 2048
TIMED = 65536


def scorers(run: Path) -> dict[str, Any]:
    """Protocol -> (function of `max_tokens`, tokens that it reads for each that it scores)."""
    restored = open_run(run)
    text = read_split(restored.config, restored.tokenizer, "enwik8:test", None)
    found: dict[str, Any] = {
        f"context {context:,}, stride {stride}": (
            partial(evaluate, restored.model, text, context=context, stride=stride),
            context / stride,
        )
        for context, stride in WINDOWS
    }
    carried = partial(evaluate_carried, restored.model, text, seq_len=restored.config.data.seq_len, carry=CARRY)
    return {**found, f"carry {CARRY:,}": (carried, 1.0)}


def rows_of(name: str, run: Path) -> list[dict[str, Any]]:
    """One row for each protocol."""
    how = scorers(run)
    results: dict[str, Evaluation] = {protocol: score() for protocol, (score, _) in how.items()}
    seconds = alternated({protocol: partial(score, max_tokens=TIMED) for protocol, (score, _) in how.items()}, 3)
    return [
        {
            "model": name,
            "protocol": protocol,
            "bits per byte": f"{results[protocol].bits_per_byte:.6f}",
            "scored bytes": results[protocol].bytes,
            "read per scored byte": reads,
            "bytes per second": round(TIMED / seconds[protocol]),
        }
        for protocol, (_, reads) in how.items()
    ]


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="enwik8, or a prefix of it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default="runs/protocols")
    parser.add_argument("--json", help="where to keep the numbers")
    arguments = parser.parse_args()
    rows = []
    for name, mixer in MODELS.items():
        run = Path(arguments.folder) / name
        words = [*SETTINGS, mixer, f"data.path={arguments.path}", f"train.threads={arguments.threads}"]
        lmtrain("train", "enwik8/dense", *words, f"run.dir={run}")
        rows += rows_of(name, run)
    publish(rows, arguments.json)


if __name__ == "__main__":
    main()
