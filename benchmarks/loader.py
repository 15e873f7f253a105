"""Tokens per second of the data loader. Run: python benchmarks/loader.py [--tokens N] [--json FILE]

The goal is never to be what a run waits for: far above the 10^6 tokens per second of a small model on one
GPU. Each row times optimizer steps of one micro-batch of 65,536 tokens as a training loop takes them, prefetch thread
included, on random bytes in documents of 20,000 tokens on average.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import publish
from data.corpus import load_corpus
from data.loader import DOCUMENTS, Loader
from data.shards import TokenDataset, prepare
from data.tokenizer import ByteTokenizer

SEQ_LENS = (1024, 8192, 65_536)
BATCH_TOKENS = 65_536
DOCUMENT_TOKENS = 20_000
STEPS, REPEATS = 20, 5


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        dataset = random_dataset(Path(folder), arguments.tokens)
        shapes = [(seq_len, documents) for seq_len in SEQ_LENS for documents in DOCUMENTS]
        rounds = [[seconds_per_step(dataset, *shape) for shape in shapes] for _ in range(REPEATS)]
    rows = [
        {
            "b": BATCH_TOKENS // seq_len,
            "T": seq_len,
            "documents": documents,
            "ms a step": 1e3 * statistics.median(seconds),
            "million tokens/s": BATCH_TOKENS / statistics.median(seconds) / 1e6,
            "slowest round": BATCH_TOKENS / max(seconds) / 1e6,
        }
        for (seq_len, documents), seconds in zip(shapes, zip(*rounds))
    ]
    publish(rows, arguments.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=50_000_000, help="size of the text")
    parser.add_argument("--json", metavar="FILE", help="keep the numbers")
    return parser.parse_args()


def random_dataset(folder: Path, num_tokens: int) -> TokenDataset:
    generator = np.random.default_rng(0)
    texts = folder / "texts"
    texts.mkdir()
    cuts = np.sort(generator.integers(1, num_tokens, num_tokens // DOCUMENT_TOKENS))
    for index, document in enumerate(np.split(generator.integers(0, 256, num_tokens, dtype=np.uint8), cuts)):
        (texts / f"{index:06}").write_bytes(document.tobytes())
    return prepare(load_corpus("text", str(texts)), "all", ByteTokenizer(), folder / "cache")


def seconds_per_step(dataset: TokenDataset, seq_len: int, documents: str) -> float:
    sequences = BATCH_TOKENS // seq_len
    loader = Loader(
        dataset, seq_len=seq_len, batch_sequences=sequences, micro_batch=sequences, seed=0, documents=documents
    )
    steps = loader.batches(0)
    for _ in range(8):  # what was made ahead is not what is timed
        next(steps)
    start = time.perf_counter()
    for _ in range(STEPS):
        next(steps)
    return (time.perf_counter() - start) / STEPS


if __name__ == "__main__":
    main()
