"""Word perplexity of small models on books: dense attention, a window beside MoSA, and Transformer-VQ.

    python benchmarks/pg19.py [--books FOLDER] [--json FILE]

Trains configs/pg19 on the books of $LMTRAIN_DATA, and scores the test books in FOLDER, which is laid out as PG-19 is
(`test/NUMBER.txt`; default: those of $LMTRAIN_DATA), in disjoint windows of the training length and, as one stream,
with the state of every mixer carried along. Runs are kept in a folder; a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from report import lmtrain, publish

MIXERS = ("dense", "local-mosa", "vq")


def row(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model: trained now unless it was before, scored in both ways."""
    run = Path(arguments.folder) / name
    lmtrain("train", f"pg19/{name}", f"run.dir={run}", f"train.threads={arguments.threads}")
    books = ["--path", arguments.books] if arguments.books else []
    words = ["eval", str(run), "--on", "pg19:test", *books, "--json"]
    windows, carried = (json.loads(lmtrain(*words, *how)) for how in ([], ["--carry"]))
    cost = json.loads(lmtrain("inspect", str(run), "--json"))
    train = cost["config"]["train"]
    return {
        "mixer": name,
        "corpus": f"{windows['corpus']} {windows['split']}",
        "word perplexity": windows["word_perplexity"],
        "bits per byte": windows["bits_per_byte"],
        "carried word perplexity": carried["word_perplexity"],
        "words": windows["words"],
        "training tokens": train["steps"] * train["batch_tokens"],
        "training FLOPs per token": cost["flops_per_token"]["training"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", help="folder of the test books")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", default="runs/pg19")
    parser.add_argument("--json", help="where to keep the numbers")
    arguments = parser.parse_args()
    publish([row(name, arguments) for name in arguments.mixers], arguments.json)


if __name__ == "__main__":
    main()
