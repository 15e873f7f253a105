"""nanoGPT's CPU setting on tiny Shakespeare: validation loss after 2,000 steps, and speed beside nanoGPT itself.

    python benchmarks/shakespeare.py TEXT [--nanogpt FOLDER] [--json FILE]

FOLDER is a checkout of nanoGPT whose data/shakespeare_char is prepared; it is run unmodified, with the flags of its
README for a CPU. Speed is the median time of a step over short runs in turn: ours, theirs, ours, theirs.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from report import publish

from lmtrain.run import read_metrics

BATCH_TOKENS = 12 * 64
FLAGS = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --lr_decay_iters=2000 --dropout=0.0 --eval_interval=100000"
)


def ours(text: str, steps: int, *more: str) -> list[dict[str, float]]:
    """The rows of metrics.jsonl of a run of `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"data.path={text}", f"train.steps={steps}", f"run.dir={folder}/run", *more]
        subprocess.run(
            [sys.executable, "-m", "lmtrain", "train", "shakespeare", *settings], check=True, stderr=subprocess.DEVNULL
        )
        return read_metrics(Path(folder) / "run")


def our_speed(text: str, steps: int) -> float:
    """Median milliseconds of a step."""
    rows = ours(text, steps, "log.every=1", "eval.every=0", "eval.tokens=64")
    return statistics.median(1000 * BATCH_TOKENS / row["tokens_per_second"] for row in rows if "split" not in row)


def their_speed(folder: str, steps: int) -> float:
    """Median milliseconds of an iteration of nanoGPT, by its own log."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *FLAGS.split()]
        command += [f"--max_iters={steps}", f"--out_dir={out}"]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    times = [float(time) for time in re.findall(r"^iter \d+: .*time ([\d.]+)ms", done.stdout, re.M)]
    return statistics.median(times[1:])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tiny Shakespeare, 1,115,394 characters")
    parser.add_argument("--nanogpt", help="a checkout to run beside ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="where to keep the numbers")
    arguments = parser.parse_args()
    rows = [
        {"what": "validation loss, nats per character", "step": row["step"], "lmtrain": row["loss"], "nanoGPT": None}
        for row in ours(arguments.text, 2000)
        if "split" in row
    ]
    if arguments.nanogpt:
        rounds = [
            (our_speed(arguments.text, 200), their_speed(arguments.nanogpt, 200)) for _ in range(arguments.rounds)
        ]
        mine, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        rows.append({"what": "milliseconds per step, 768 tokens", "step": 200, "lmtrain": mine, "nanoGPT": theirs})
    publish(rows, arguments.json)


if __name__ == "__main__":
    main()
