"""`lmtrain prepare`: every split of a corpus in tokens, before a run needs them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import CORPORA
from data.dataset import TokenDataset
from data.shards import dataset_folder
from data.shards import prepare as prepare_split
from data.tasks import TASKS
from data.tokenizer import Tokenizer, tokenizer_hash
from lmtrain.config import Config, load
from lmtrain.progress import Progress
from lmtrain.setup import make_tokenizer, read_texts

EVERY = 15.0
"""Seconds between two lines where nobody watches."""


@dataclass(frozen=True)
class Prepared:
    """What there is now. splits: name, in a mixture `text:name`, -> its folder, and what that holds."""

    corpus: str
    tokenizer: Tokenizer
    splits: dict[str, tuple[Path, TokenDataset]]

    def to_json(self) -> dict[str, Any]:
        """All numbers, for `--json`."""
        tokenizer = {
            "name": self.tokenizer.name,
            "vocab_size": self.tokenizer.vocab_size,
            "sha256": tokenizer_hash(self.tokenizer),
        }
        splits = {name: _numbers(folder, dataset) for name, (folder, dataset) in self.splits.items()}
        return {"corpus": self.corpus, "tokenizer": tokenizer, "splits": splits}

    def format(self) -> str:
        """The same for a person."""
        lines = [f"{self.corpus} in {self.tokenizer.vocab_size:,} tokens ({self.tokenizer.name})"]
        for name, (folder, dataset) in self.splits.items():
            numbers = _numbers(folder, dataset)
            lengths = numbers["tokens_per_document"]
            lines += [
                f"{name}: {folder}",
                f"  {numbers['documents']:,} documents, {numbers['tokens']:,} tokens, {numbers['bytes']:,} bytes, "
                f"{numbers['words']:,} words; {numbers['bytes_per_token']:.3f} bytes per token",
                f"  tokens of a document: {lengths['min']:,} to {lengths['max']:,}, "
                f"median {lengths['median']:,.0f}, mean {lengths['mean']:,.0f}",
                f"  fingerprint {dataset.fingerprint}",
            ]
        return "\n".join(lines)


def read_order(config_or_corpus: str, overrides: Sequence[str]) -> Config:
    """The configuration of that file or name; of the name of a corpus, one that differs from the demo in its data."""
    if config_or_corpus in CORPORA and not Path(config_or_corpus).is_file():
        return load("demo", [f"data.corpus={config_or_corpus}", *overrides])
    return load(config_or_corpus, overrides)


def prepare(config: Config, workers: int | None = None, progress: Progress | None = None) -> Prepared:
    """Every split of the corpus in tokens, but for `all`, which holds the others.

    workers: processes that tokenize; None: as many as this one may use processors. KeyboardInterrupt, also on SIGTERM,
    once the parts that were begun are finished: the next call goes on from there. ValueError as
    `data.shards.prepare`.
    """
    if config.data.corpus in TASKS:
        raise ValueError(f"data.corpus: {config.data.corpus} is made as it is read, there is nothing to prepare")
    progress = progress or Progress(sys.stderr)
    workers = workers or len(os.sched_getaffinity(0))
    with _terminable():
        corpora = read_texts(config)
        tokenizer = make_tokenizer(config, list(corpora.values()))
        splits = {}
        for name, corpus in corpora.items():
            for split in [split for split in corpus.splits if split != "all"] or ["all"]:
                watch = _Speed(progress, f"{corpus.name} {split}")
                dataset = prepare_split(corpus, split, tokenizer, config.data.cache, workers=workers, watch=watch)
                called = split if len(corpora) == 1 else f"{name}:{split}"
                splits[called] = dataset_folder(corpus, split, tokenizer, config.data.cache), dataset
    return Prepared(corpus.name if len(corpora) == 1 else config.data.corpus, tokenizer, splits)


def _numbers(folder: Path, dataset: TokenDataset) -> dict[str, Any]:
    lengths = np.diff(dataset.document_starts)
    return {
        "path": str(folder),
        "documents": len(lengths),
        "tokens": len(dataset.tokens),
        "bytes": dataset.bytes,
        "words": dataset.words,
        "bytes_per_token": dataset.bytes / len(dataset.tokens),
        "tokens_per_document": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "fingerprint": dataset.fingerprint,
    }


class _Speed:
    """Says how much of a text is tokenized, and how fast that goes."""

    def __init__(self, progress: Progress, what: str) -> None:
        self.progress = progress
        self.what = what
        self.began: tuple[float, int] | None = None  # what was found finished took no time
        self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.began = self.began or (now, done)
        seconds, first = now - self.began[0], self.began[1]
        speed = f", {(done - first) / seconds / 1e6:.1f} MB/s" if done > first else ""
        due = now >= self.said + EVERY
        self.progress.update(f"{self.what}: {done / total:.0%}{speed}", logged=due)
        self.said = now if due else self.said


@contextmanager
def _terminable() -> Iterator[None]:
    """While entered, SIGTERM does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
