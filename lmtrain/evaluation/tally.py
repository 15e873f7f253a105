"""Sums over scored targets: by the number of tokens that they saw, by document, by block of the text."""

import math

import numpy as np

from data.dataset import TokenDataset
from lmtrain.evaluation.result import Bucket, Evaluation, Part, Protocol
from lmtrain.evaluation.scoring import Scored

BUCKET_EDGES = 64 << np.arange(32)

BLOCK_BYTES = 1 << 16
"""Neighbouring blocks of so much text are taken for independent where there are no documents to compare by."""
FEW_DOCUMENTS = 10
"""Fewer documents than this are too few to resample: then blocks are counted besides."""
CHUNK = 1 << 20  # tokens looked at at a time


class Sums:
    """Tokens, bytes and nats by stretch of the text: stretch i is the tokens [borders[i], borders[i + 1])."""

    def __init__(self, borders: np.ndarray, token_bytes: np.ndarray) -> None:
        self.borders = borders
        self.token_bytes = token_bytes
        self.tokens = np.zeros(len(borders) - 1, dtype=np.int64)
        self.bytes = np.zeros(len(borders) - 1, dtype=np.int64)
        self.nats = np.zeros(len(borders) - 1)

    def add(self, scored: Scored) -> None:
        """Count a batch. Neighbouring targets mostly share a stretch, so its sums touch few of them."""
        stretch = np.searchsorted(self.borders, scored.positions.ravel(), side="right") - 1
        first = int(stretch.min())
        at, touched = stretch - first, slice(first, int(stretch.max()) + 1)
        self.tokens[touched] += np.bincount(at)
        self.bytes[touched] += np.bincount(at, self.token_bytes[scored.targets].ravel()).astype(np.int64)
        self.nats[touched] += np.bincount(at, scored.losses.ravel())


class Tally:
    """Whatever an evaluation counts, of the targets before token `stop` of the split."""

    def __init__(self, dataset: TokenDataset, stop: int) -> None:
        token_bytes = dataset.tokenizer.token_bytes
        self.dataset = dataset
        self.stop = stop
        self.nats = np.zeros(len(BUCKET_EDGES))
        self.tokens = np.zeros(len(BUCKET_EDGES), dtype=np.int64)
        starts = dataset.document_starts
        self.documents = Sums(starts[: int(np.searchsorted(starts, stop)) + 1], token_bytes)
        few = len(starts) - 1 < FEW_DOCUMENTS
        self.blocks = Sums(block_borders(dataset, stop), token_bytes) if few else None

    def add(self, scored: Scored, seen: int | None = None) -> None:
        """Count a batch. A window's first target saw `seen` tokens, by default those of the window alone."""
        if seen is None:
            seen = scored.windows[0].first_scored - scored.windows[0].start
        num_windows, num_targets = scored.losses.shape
        bucket_S = np.searchsorted(BUCKET_EDGES, np.arange(seen, seen + num_targets))
        self.nats += np.bincount(bucket_S, scored.losses.sum(0), len(BUCKET_EDGES))
        self.tokens += num_windows * np.bincount(bucket_S, minlength=len(BUCKET_EDGES))
        self.documents.add(scored)
        if self.blocks is not None:
            self.blocks.add(scored)

    def result(self, protocol: Protocol) -> Evaluation:
        """The evaluation of what was counted. Its nats are those of its documents, added up exactly."""
        documents = self._documents()
        words = [part.words for part in documents]
        return Evaluation(
            protocol,
            nats=math.fsum(part.nats for part in documents),
            scored_tokens=int(self.tokens.sum()),
            bytes=sum(part.bytes for part in documents),
            words=None if None in words else sum(filter(None, words)),
            by_position=self._buckets(),
            by_document=documents,
            by_block=() if self.blocks is None else _blocks(self.blocks),
        )

    def _buckets(self) -> tuple[Bucket, ...]:
        """The mean loss of each bucket that has targets."""
        edges = [0, *BUCKET_EDGES.tolist()]
        return tuple(
            Bucket(edges[i], edges[i + 1], int(self.tokens[i]), float(self.nats[i] / self.tokens[i]))
            for i in np.flatnonzero(self.tokens).tolist()
        )

    def _documents(self) -> tuple[Part, ...]:
        """Of the last one, if it was scored in part, the words are not known."""
        sums, data = self.documents, self.dataset
        whole = (sums.borders[1:] <= self.stop).tolist()
        words = [int(n) if all_of_it else None for n, all_of_it in zip(data.document_words, whole)]
        columns = (sums.tokens.tolist(), sums.bytes.tolist(), words, sums.nats.tolist())
        return tuple(Part(*of) for of in zip(data.titles, *columns))


def block_borders(dataset: TokenDataset, stop: int) -> np.ndarray:
    """Where blocks of `BLOCK_BYTES` bytes begin, and `stop`, in tokens: a token belongs to the block of its first byte.

    So blocks of equal number hold the same text, but for a token at each end, whatever the tokenizer. What is left at
    the end, if less than half a block, belongs to the one before.
    """
    token_bytes = dataset.tokenizer.token_bytes
    borders, before, block = [0], 0, 0
    for first in range(0, stop, CHUNK):
        ends = before + token_bytes[dataset.tokens[first : min(first + CHUNK, stop)]].cumsum()
        block_of = np.concatenate([[before], ends[:-1]]) // BLOCK_BYTES
        borders += (first + np.flatnonzero(np.diff(block_of, prepend=block))).tolist()
        before, block = int(ends[-1]), int(block_of[-1])
    blocks = max(1, round(before / BLOCK_BYTES))
    return np.array([*borders[:blocks], stop])


def _blocks(sums: Sums) -> tuple[Part, ...]:
    columns = zip(sums.tokens.tolist(), sums.bytes.tolist(), sums.nats.tolist(), strict=True)
    return tuple(
        Part(f"from byte {index * BLOCK_BYTES:,}", tokens, of, None, nats)
        for index, (tokens, of, nats) in enumerate(columns)
    )
