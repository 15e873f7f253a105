"""What training on streams buys: the same bytes read as shuffled windows and as continuous rows, with state carried.

    python benchmarks/streams.py PATH [--mixers mega vq local] [--json FILE]

PATH: enwik8 or a prefix of it. Two layers of width 128 at T = 512, 8 rows a step, 300 steps: 1.2 million bytes. Both
models of a mixer are scored on the whole validation split twice: in disjoint windows of 512, and as one stream with the
state of every mixer carried along (no key outlives 2,048 bytes). Runs are kept in a folder; a second call goes on where
the first stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from report import lmtrain, publish

SETTINGS = [
    *("data.seq_len=512", "train.steps=300", "train.batch_tokens=4096", "optimizer.lr=2e-3", "model.dim=128"),
    *("model.layers=2", "eval.every=0", "eval.tokens=4096", "checkpoint.every=100", "checkpoint.keep=1"),
    "model.pattern=far",
]
MIXERS = {
    "mega": "model.mixers.far={kind: mega, chunk: 128}",
    "vq": "model.mixers.far={kind: vq, heads: 2, block: 64, codes: 64}",
    "local": "model.mixers.far={kind: local, heads: 2, window: 128}",
}
HOW = {"in windows": ["--context", "512"], "carried": ["--carry"]}


def bits(name: str, stream: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Bits per byte in windows and carried, of a run that is trained now unless it was before."""
    run = Path(arguments.folder) / f"{name}-{'stream' if stream else 'windows'}"
    kept = run / "scores.json"
    if not kept.exists():
        words = [*SETTINGS, MIXERS[name], f"data.path={arguments.path}", f"data.stream={str(stream).lower()}"]
        lmtrain("train", "enwik8/dense", *words, f"run.dir={run}", f"train.threads={arguments.threads}")
        scores = {how: json.loads(lmtrain("eval", str(run), "--json", *words)) for how, words in HOW.items()}
        kept.write_text(json.dumps({how: score["bits_per_byte"] for how, score in scores.items()}))
    return json.loads(kept.read_text())


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="enwik8, or a prefix of it")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default="runs/streams")
    parser.add_argument("--json", help="where to keep the numbers")
    arguments = parser.parse_args()
    rows = [
        {"mixer": name, "trained on": "streams" if stream else "windows", **bits(name, stream, arguments)}
        for name in arguments.mixers
        for stream in (False, True)
    ]
    publish(rows, arguments.json)


if __name__ == "__main__":
    main()
