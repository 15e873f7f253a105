"""Speed of tokenizing a text into shards. Run: python benchmarks/prepare.py [--megabytes N] [--json FILE]

Goals: more than 5 MB/s of a core for bytes, and byte-pair encoding within 1.2 times the time of `encode_batch`, the
batch call of the package tokenizers, on the same documents with as many threads. Ours reads, counts words, hashes and
writes as well. The text is the standard library's, repeated; the vocabulary has 32,000 tokens of it.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import publish
from data import bpe
from data.corpus import load_corpus
from data.dataset import write_dataset
from data.document import Split
from data.tokenizer import ByteTokenizer, Tokenizer
from lmtrain.bench.measure import timed_in_turn

VOCABULARY = 32_000


def main() -> None:
    arguments = parse_arguments()
    source = load_corpus("stdlib").split("train")
    times = -(-arguments.megabytes * 1_000_000 // source.num_bytes)
    text = Split(source.documents * times)
    tokenizer = bpe.train(source, VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *speeds("bytes", text, {"lmtrain": lambda: prepare(folder, text, ByteTokenizer())}, 1, arguments.repeats),
            *compared(folder, text, tokenizer, 1, arguments.repeats),
            *compared(folder, text, tokenizer, os.cpu_count() or 1, arguments.repeats),
        ]
    publish(rows, arguments.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=32, help="of text, at least (32)")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing (3)")
    parser.add_argument("--json", metavar="FILE", help="keep the numbers")
    return parser.parse_args()


def compared(folder: str, text: Split, tokenizer: bpe.BpeTokenizer, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Byte-pair encoding by us and by the library alone, taken in turn."""
    documents = [b"".join(document.chunks()).decode() for document in text.documents]
    library = tokenizer.library
    # The library's threads are the processors of the machine, or one.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    workers = threads if threads > 1 else 0
    runs = {
        "lmtrain": lambda: prepare(folder, text, tokenizer, workers),
        "encode_batch": lambda: library.encode_batch(documents, add_special_tokens=False),
    }
    return speeds("bpe", text, runs, threads, repeats)


def speeds(name: str, text: Split, runs: dict[str, Any], threads: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each run, with its time as a multiple of the last one's."""
    seconds = {who: timing.median for who, timing in timed_in_turn(runs, repeats).items()}
    *_, base = seconds.values()
    return [
        {
            "tokenizer": name,
            "threads": threads,
            "by": who,
            "MB/s": text.num_bytes / taken / 1e6,
            "MB/s of a core": text.num_bytes / taken / 1e6 / threads,
            "time": taken / base,
        }
        for who, taken in seconds.items()
    ]


def prepare(folder: str, text: Split, tokenizer: Tokenizer, workers: int = 0) -> None:
    """The whole way, flushed to disk; then it is removed."""
    dataset = Path(folder) / "dataset"
    write_dataset(dataset, "stdlib", "train", text, tokenizer, workers=workers)
    shutil.rmtree(dataset)


if __name__ == "__main__":
    main()
