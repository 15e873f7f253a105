"""What each mixer remembers: accuracy on synthetic tasks, and on passkeys by depth and length.

    python benchmarks/recall.py [--tasks mqar passkey] [--mixers dense local ...]   trains what is missing, reports
    python benchmarks/recall.py --report                                            only writes the pages anew

Two layers of width 64, each mixer alone in both, with the settings of configs/recall but for `SHORTER`, and the same
examples in the same order, so at one learning rate, which is not the best one of each. Mixers with a bound see about a
quarter of 256 tokens at once. Runs are kept in a folder; a second call goes on where the first stopped. Each finished
run is a row of benchmarks/results/recall.json, from which the tables of docs/recall.md and README.md and
docs/passkey.svg are made.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from report import environment, lmtrain, table

from lmtrain.evaluation.heatmap import draw_grids
from lmtrain.run import read_metrics

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/recall.json"
MIXERS = {
    "dense": "{kind: dense, heads: 2}",
    "local": "{kind: local, heads: 2, window: 64}",
    "sparse": "{kind: sparse, heads: 2, block: 32, columns: 8}",
    "s2": "{kind: s2, heads: 2, block: 16, local_blocks: 2}",
    "routing": "{kind: routing, heads: 2, clusters: 4, window: 64}",
    "mosa": "{kind: mosa, heads: 8, head_dim: 32, keep: 64}",
    "sparsek": "{kind: sparsek, heads: 2, keep: 32, window: 32}",
    "combiner": "{kind: combiner, heads: 2, span: 16}",
    "vq": "{kind: vq, heads: 2, codes: 64, block: 32}",
    "mega": "{kind: mega, chunk: 64}",
    "moh": "{kind: moh, heads: 4, head_dim: 32, shared_heads: 1, active_heads: 1}",
    "inattention": "{kind: inattention, heads: 2}",
}
EVALUATIONS = {
    "mqar": ["--on", "mqar:test", "--examples", "512"],
    "passkey": ["--on", "passkey:test", "--length", "128,256,512", "--examples", "100"],
}
SHORTER = {"mqar": ["train.steps=1500"], "passkey": ["train.steps=1500", "data.seq_len=128"]}
"""Than in configs/recall: what dense attention learns with some steps to spare."""
LEARNT = 0.95
SETTINGS = ["train.threads=1", "log.tensorboard=false", "log.every=50"]


def result(task: str, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and ask one model: its row."""
    run = folder / f"{task}-{name}-{seed}"
    settings = [f"recall/{task}", f"model.mixers.it={MIXERS[name]}", *SETTINGS, *SHORTER[task], f"run.seed={seed}"]
    lmtrain("train", *settings, f"run.dir={run}")
    told = json.loads(lmtrain("eval", str(run), *EVALUATIONS[task], "--json"))
    cost = json.loads(lmtrain("inspect", *settings, "--json"))
    rows = read_metrics(run)
    curve = {row["step"]: row["accuracy"] for row in rows if "split" in row}
    seconds, before = 0.0, 0
    for row in rows:
        if "split" not in row:
            seconds += (row["tokens"] - before) / row["tokens_per_second"]
            before = row["tokens"]
    return {
        "task": task,
        "mixer": name,
        "settings": MIXERS[name],
        "seed": seed,
        "corpus": told["corpus"],
        "steps": max(curve),
        "accuracy": told["accuracy"],
        "accuracy_standard_error": told["accuracy_standard_error"],
        "example_accuracy": told["example_accuracy"],
        "loss": told["loss"],
        "scored_tokens": told["scored_tokens"],
        "scoring": told["scoring"],
        "grid": told.get("grid"),
        "curve": curve,
        "seconds": round(seconds, 1),
        "parameters": cost["parameters"],
        "pairs_per_token": cost["pairs_per_token"],
        "environment": environment(),
    }


def read_results() -> list[dict[str, Any]]:
    """The rows so far."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def keep(rows: list[dict[str, Any]]) -> None:
    """Write all rows, whole or not at all."""
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    temporary.replace(RESULTS)


def learnt_at(row: dict[str, Any]) -> str:
    """The first step at which the validation accuracy was above `LEARNT`."""
    reached = [int(step) for step, accuracy in row["curve"].items() if accuracy > LEARNT]
    return f"{min(reached):,}" if reached else f"not in {row['steps']:,}"


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Task -> its table in Markdown, mixers in the order of `MIXERS`."""
    order = list(MIXERS)
    found = {}
    for task in EVALUATIONS:
        mine = sorted(
            (row for row in rows if row["task"] == task), key=lambda row: (order.index(row["mixer"]), row["seed"])
        )
        if mine:
            found[task] = table([_cells(row) for row in mine])
    return found


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    cells = {"mixer": f"`{row['settings']}`"}
    if row["grid"] is None:
        cells["accuracy"] = f"{row['accuracy']:.3f}"
    else:
        for length in dict.fromkeys(cell["length"] for cell in row["grid"]):
            at = [cell["accuracy"] for cell in row["grid"] if cell["length"] == length]
            cells[f"T = {length}"] = f"{sum(at) / len(at):.3f}"
    return cells | {
        f"> {LEARNT} at step": learnt_at(row),
        "pairs per token": f"{row['pairs_per_token']:.0f}",
        "parameters": f"{row['parameters']:,}",
    }


def sentence(rows: list[dict[str, Any]]) -> str:
    """The paragraph of the README: the accuracies of all mixers, best first."""
    parts = []
    for task in EVALUATIONS:
        mine = sorted((row for row in rows if row["task"] == task), key=lambda row: -row["accuracy"])
        if mine:
            told = ", ".join(f"`{row['mixer']}` {row['accuracy']:.2f}" for row in mine)
            parts.append(textwrap.fill(f"{mine[0]['corpus']} after {mine[0]['steps']:,} steps: {told}.", 120))
    return "\n\n".join(parts)


def put(page: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- end of mark -->` on a page."""
    before, opening, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    _, closing, behind = rest.partition(f"<!-- end of {mark} -->")
    assert opening, f"{page} has no mark {mark}"
    assert closing, f"{page} has no end of {mark}"
    page.write_text(f"{before}{opening}{text}\n{closing}{behind}")


def report(root: Path = ROOT) -> None:
    """Write tables, paragraph and heat map of all rows into the pages below `root`."""
    rows = read_results()
    for task, text in tables(rows).items():
        put(root / "docs/recall.md", f"table of {task}", text)
    put(root / "README.md", "recall", sentence(rows))
    grids = {row["mixer"]: row["grid"] for row in rows if row["grid"] is not None}
    if grids:
        ordered = {name: grids[name] for name in MIXERS if name in grids}
        some = next(iter(grids.values()))
        lengths = list(dict.fromkeys(cell["length"] for cell in some))
        depths = list(dict.fromkeys(cell["depth"] for cell in some))
        shares = {
            name: [[cell["accuracy"] for cell in grid if cell["length"] == length] for length in lengths]
            for name, grid in ordered.items()
        }
        draw_grids(
            shares, [f"{n:,}" for n in lengths], [f"{d:g}" for d in depths], root / "docs/passkey.svg",
            row_label="bytes", column_label="depth",
        )  # fmt: skip


def main() -> None:
    """Train what is missing, mixer by mixer, and report after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(EVALUATIONS), choices=list(EVALUATIONS))
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/recall"))
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    for name in [] if arguments.report else arguments.mixers:
        for task in arguments.tasks:
            done = [(row["task"], row["mixer"], row["seed"]) for row in read_results()]
            if (task, name, arguments.seed) not in done:
                row = result(task, name, arguments.seed, arguments.folder)
                keep([*read_results(), row])
                report()
    report()


if __name__ == "__main__":
    main()
