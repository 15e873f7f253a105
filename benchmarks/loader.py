"""Tokens per second of the data loader. Run: python benchmarks/loader.py [--tokens N] [--batch-tokens N]

The goal is never to be what a run waits for: far above the 10^6 tokens per second of a small model on one
GPU. Each row times optimizer steps as a training loop takes them, prefetch thread included, on random bytes
in documents of 20,000 tokens on average.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.corpus import load_corpus
from data.loader import DOCUMENTS, Loader
from data.shards import TokenDataset, prepare
from data.tokenizer import ByteTokenizer

SEQ_LENS = (64, 1024, 16_384, 65_536)
DOCUMENT_TOKENS = 20_000
SECONDS = 1.0


def main() -> None:
    arguments = parse_arguments()
    print(f"{'seq_len':>8}  {'documents':<12}{'Mtokens/s':>10}{'ms/step':>10}")
    with tempfile.TemporaryDirectory() as folder:
        dataset = random_dataset(Path(folder), arguments.tokens)
        for seq_len in SEQ_LENS:
            for documents in DOCUMENTS:
                seconds = seconds_per_step(dataset, seq_len, arguments.batch_tokens, documents)
                speed = arguments.batch_tokens / seconds / 1e6
                print(f"{seq_len:>8}  {documents:<12}{speed:>10.1f}{seconds * 1e3:>10.2f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=50_000_000, help="size of the text")
    parser.add_argument("--batch-tokens", type=int, default=1 << 19, help="tokens of an optimizer step")
    return parser.parse_args()


def random_dataset(folder: Path, num_tokens: int) -> TokenDataset:
    generator = np.random.default_rng(0)
    texts = folder / "texts"
    texts.mkdir()
    cuts = np.sort(generator.integers(1, num_tokens, num_tokens // DOCUMENT_TOKENS))
    for index, document in enumerate(np.split(generator.integers(0, 256, num_tokens, dtype=np.uint8), cuts)):
        (texts / f"{index:06}").write_bytes(document.tobytes())
    return prepare(load_corpus("text", str(texts)), "all", ByteTokenizer(), folder / "cache")


def seconds_per_step(dataset: TokenDataset, seq_len: int, batch_tokens: int, documents: str) -> float:
    sequences = batch_tokens // seq_len
    loader = Loader(
        dataset,
        seq_len=seq_len,
        batch_sequences=sequences,
        micro_batch=max(1, sequences // 4),
        seed=0,
        documents=documents,
    )
    steps: Iterator = loader.batches(0)
    for _ in range(8):  # what was made ahead is not what is timed
        next(steps)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        next(steps)
        count += 1
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
