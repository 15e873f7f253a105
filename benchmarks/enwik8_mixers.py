"""Validation bits per byte of mixers on the beginning of enwik8, at equal FLOPs per token and on the same tokens.

    python benchmarks/enwik8_mixers.py PATH [--mixers dense local ...] [--seeds 1 2 3] [--json FILE]

PATH: enwik8 or a prefix of it. Four layers of width 256 at T = 2,048 train on the same 400 x 2,048 bytes, in the same
order, with the same settings, so at one learning rate, which is not the best one of each. Heads (of moh and mega the
feed-forward layer) are chosen by hand so that `lmtrain inspect` counts the FLOPs of dense, to 2 %. The whole validation
split is scored in disjoint windows of 2,048, and once more as one stream, with the state of every mixer carried along
(no key outlives 8,192 bytes). Runs are kept in a folder; a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from report import lmtrain, publish

SETTINGS = [
    *("data.seq_len=2048", "train.steps=400", "train.batch_tokens=2048", "optimizer.lr=1.5e-3", "model.dim=256"),
    *("model.layers=4", "eval.every=0", "eval.tokens=4096", "checkpoint.every=200", "checkpoint.keep=1"),
    "model.pattern=far",
]
NEAR = "model.mixers.near={kind: local, heads: 4, head_dim: 64, window: 256}"
BESIDE = "model.pattern=near+far"
MIXERS = {
    "dense": ["model.mixers.far={kind: dense, heads: 4}"],
    "local": ["model.mixers.far={kind: local, heads: 8, head_dim: 64, window: 256}"],
    "local+mosa": [NEAR, "model.mixers.far={kind: mosa, heads: 21, head_dim: 64, keep: 128}", BESIDE],
    "local+routing": [
        NEAR,
        "model.mixers.far={kind: routing, heads: 6, head_dim: 64, clusters: 8, window: 256}",
        BESIDE,
    ],
    "sparsek": ["model.mixers.far={kind: sparsek, heads: 7, head_dim: 64, keep: 128, window: 128}"],
    "moh": [
        "model.mixers.far={kind: moh, heads: 6, head_dim: 64, shared_heads: 2, active_heads: 2}",
        "model.ffn_dim=624",
    ],
    "mega": ["model.mixers.far={kind: mega, chunk: 512}", "model.ffn_dim=800"],
    "vq": ["model.mixers.far={kind: vq, heads: 6, head_dim: 64, block: 128, codes: 128}"],
}
"""Overrides of configs/enwik8/dense.yaml, behind SETTINGS."""


def result(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cost and bits per byte of one run: trained and scored now, unless that was done before."""
    run = Path(arguments.folder) / f"{name}-{seed}"
    settings = [*SETTINGS, *MIXERS[name], f"data.path={arguments.path}", f"train.threads={arguments.threads}"]
    kept = run / "result.json"
    if not kept.exists():
        lmtrain("train", "enwik8/dense", *settings, f"run.seed={seed}", f"run.dir={run}")
        scored = json.loads(lmtrain("eval", str(run), "--json"))
        cost = json.loads(lmtrain("inspect", "enwik8/dense", *settings, "--json"))
        kept.write_text(json.dumps({"eval": scored, "cost": cost}))
    carried = run / "carried.json"
    if not carried.exists():
        carried.write_text(lmtrain("eval", str(run), "--carry", "--json"))
    return {**json.loads(kept.read_text()), "carried": json.loads(carried.read_text())}


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="enwik8, or a prefix of it")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2, help="of a run; another number rounds sums otherwise")
    parser.add_argument("--folder", default="runs/enwik8-mixers")
    parser.add_argument("--json", help="where to keep the numbers")
    arguments = parser.parse_args()
    results = {(seed, name): result(name, seed, arguments) for seed in arguments.seeds for name in arguments.mixers}
    rows = []
    for name in arguments.mixers:
        mine = [results[seed, name] for seed in arguments.seeds]
        bits = [one["eval"]["bits_per_byte"] for one in mine]
        cost = mine[0]["cost"]
        rows.append(
            {
                "mixer": name,
                "bits per byte": statistics.mean(bits),
                "of each seed": ", ".join(f"{value:.3f}" for value in bits),
                "state carried": statistics.mean(one["carried"]["bits_per_byte"] for one in mine),
                "MFLOPs per token": cost["flops_per_token"]["forward"] / 1e6,
                "parameters": cost["parameters"],
                "pairs per token": cost["pairs_per_token"],
                "state bytes": cost["state_bytes"],
            }
        )
    scored = results[arguments.seeds[0], arguments.mixers[0]]["eval"]
    print(
        f"{scored['corpus']} {scored['split']}, {scored['scored_tokens']:,} bytes scored, context {scored['context']}"
    )
    publish(rows, arguments.json)


if __name__ == "__main__":
    main()
