"""What crosses between 2 ranks that share a sequence: bytes per token for each mixer, beside gathering all keys.

    torchrun --nproc-per-node 2 benchmarks/traffic.py [--length 8192] [--json benchmarks/results/traffic.json]
    python benchmarks/traffic.py --docs

Every mixer has its default settings, the width 256 and fresh weights; the input is random, one sequence in float32.
`--docs` writes the table of docs/sequence.md from the kept numbers.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from report import publish, table

from attention.mixer import MIXERS, Context, Mixer, build
from parallel.sequence import SequenceShard, even_lengths
from parallel.world import World, join

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results/traffic.json", ROOT / "docs/sequence.md"
BEGIN, END = "<!-- traffic: python benchmarks/traffic.py --docs -->\n", "<!-- end of traffic -->"
DIM = 256

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}, {"kv_heads": 2}],
    "sparse": [{"pattern": "fixed"}, {"pattern": "strided"}],
    "combiner": [{"pattern": "fixed"}, {"pattern": "logsparse"}, {"pattern": "axial"}],
}


def subjects() -> list[tuple[str, dict[str, Any]]]:
    """Kind and settings of every mixer, with the patterns of those that have several."""
    return [(kind, settings) for kind in sorted(MIXERS) for settings in VARIANTS.get(kind, [{}])]


def all_keys(mixer: Any) -> int:
    """Bytes of key and value of a token, of all key heads: what a rank that has half of the tokens sends for each of
    its own if it sends all, and as much comes back as their gradients."""
    if hasattr(mixer, "query_dim"):
        numbers = mixer.query_dim + mixer.value_dim
    else:
        width = mixer.head_dim + getattr(mixer, "value_dim", mixer.head_dim)
        numbers = getattr(mixer, "kv_heads", mixer.heads) * width
    return 4 * numbers


def measured(mixer: Mixer, world: World, length: int) -> tuple[float, float]:
    """Bytes that this rank sends for each of its tokens, forward and backward."""
    shard = SequenceShard(world, even_lengths(length, world.sequence))
    x = torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(1))[:, shard.tokens].requires_grad_()
    y, losses = mixer(x, Context(shard=shard))
    forward = shard.sent
    (y.square().sum() + sum(losses.values())).backward()
    return forward / x.shape[1], (shard.sent - forward) / x.shape[1]


def measure(world: World, length: int) -> list[dict[str, Any]]:
    """A row for each mixer: of the first rank and the last one."""
    rows = []
    for kind, settings in subjects():
        torch.manual_seed(0)
        mixer = build(kind, DIM, **settings)
        told = world.gather(measured(mixer, world, length))
        everything = all_keys(mixer)
        name = " ".join([f"`{kind}`", *(f"{key} {value}" for key, value in settings.items())])
        rows.append(
            {
                "mixer": name,
                "what crosses": mixer.sequence_parallel,
                "rank 0 sends": told[0][0],
                "rank 1 sends": told[-1][0],
                "gradients to rank 0": told[-1][1],
                "gradients to rank 1": told[0][1],
                "all keys": everything,
                "share": round(told[0][0] / everything, 4),
            }
        )
    return rows


def documented(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in docs/sequence.md."""
    return BEGIN + table([{name: _in_words(name, value) for name, value in row.items()} for row in rows]) + "\n" + END


def _in_words(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.3f}" if name == "share" else f"{value:,.1f}".removesuffix(".0")


def main() -> None:
    """Measure and print, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--json", help="where to keep the numbers")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/sequence.md instead")
    arguments = parser.parse_args()
    if arguments.docs:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + documented(json.loads(RESULTS.read_text())["rows"]) + rest.partition(END)[2])
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with join(sequence=2) as world:
        rows = measure(world, arguments.length)
        if world.is_first:
            print(f"bytes per token of a rank, {arguments.length} tokens on {world.size} ranks")
            publish(rows, arguments.json)


if __name__ == "__main__":
    main()
