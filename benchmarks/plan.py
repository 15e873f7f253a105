"""Seconds that `lmtrain sweep plan` takes for 1,000 runs, without the start of Python and torch.

    python benchmarks/plan.py [--json FILE]

Two mixers, five sparsities, ten sizes, ten seeds; heads are solved for so that each run has the FLOPs of dense
attention of its size. Nothing is cached when it begins. CPU time stands beside it, for machines that others use too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import yaml
from report import publish

from lmtrain.sweep.planner import make_plan

SWEEP = {
    "base": "enwik8/dense",
    "settings": {"data.seq_len": 1024, "model.pattern": "far"},
    "axes": {
        "mixer": {
            "mosa": {"model.mixers.far": {"kind": "mosa", "head_dim": 32}},
            "sparsek": {"model.mixers.far": {"kind": "sparsek", "head_dim": 32, "window": 64}},
        },
        "keep": {"model.mixers.far.keep": [256, 128, 64, 32, 16]},
        "size": {f"s{n}": {"model.dim": 64 * n, "model.layers": n + 1} for n in range(1, 11)},
    },
    "match": {
        "equal": "flops",
        "solve": "model.mixers.far.heads",
        "reference": {"model.mixers.far": {"kind": "dense", "heads": 16, "head_dim": 32}},
    },
    "seeds": list(range(1, 11)),
}


def main() -> None:
    """Plan once, print how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="where to keep the numbers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thousand.yaml"
        path.write_text(yaml.safe_dump(SWEEP, sort_keys=False))
        began, cpu = time.perf_counter(), time.process_time()
        plan = make_plan(str(path))
        text = plan.format(1e12, "as assumed here")
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert text.count("\n") > len(plan.runs)
    rows = [{"runs": len(plan.runs), "seconds": seconds, "CPU seconds": cpu, "FLOPs": plan.flops}]
    publish(rows, arguments.json)


if __name__ == "__main__":
    main()
