"""Batches of training windows: what a rank reads at each step, and what the model is told about it."""

from __future__ import annotations

import dataclasses
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.mixture import Mixture, MixtureOrder
from data.order import Ranges, SampleOrder, StreamOrder, readable
from data.prefetch import prefetch
from data.shards import TokenDataset

UNSCORED = -100  # torch's `ignore_index`
DOCUMENTS = ("concatenate", "reset")
STEPS_AHEAD = 4


@dataclass(frozen=True)
class Batch:
    """One micro-batch of b windows of T tokens. All tensors int64 [b, T].

    labels: the next token, or -100 where it is unscored.
    positions, document_ends: None if documents are concatenated, else see `Loader`.
    samples: global index of each row: consecutive ones, but for those never read.
    begins: the rows do not go on from those of the step before; always so without `stream`.
    crc: sum modulo 2^32, over the rows, of the crc32 of a row's T + 1 token ids as little-endian uint32.
        Summed over the micro-batches and ranks of a step, it tells which data the step read, on any world.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None
    document_ends: Tensor | None
    samples: tuple[int, ...]
    begins: bool
    crc: int

    @property
    def first_sample(self) -> int:
        """Of row 0."""
        return self.samples[0]

    def part(self, tokens: slice) -> Batch:
        """The same windows, of each only the tokens start..stop-1: what one of the ranks that share them reads.

        Ends of documents count from the first of these, and may lie beyond the last. The crc goes with the first token,
        so that sums over ranks stay what they are.
        """
        positions, ends = self.positions, self.document_ends
        return dataclasses.replace(
            self,
            tokens=self.tokens[:, tokens],
            labels=self.labels[:, tokens],
            positions=None if positions is None else positions[:, tokens],
            document_ends=None if ends is None else ends[:, tokens] - tokens.start,
            crc=0 if tokens.start else self.crc,
        )


class Batches(ABC):
    """Training batches of one data rank: which samples are in which, whatever they are made of.

    A step reads G = `batch_sequences` consecutive samples, all ranks together: with W = `world` and
    u = `micro_batch`, row j of micro-batch m of rank r is its sample mWu + ru + j; neither changes the set.

    skip: ranges [first, last) of samples that are never read; a step reads those after them instead.
    """

    def __init__(
        self, *, batch_sequences: int, micro_batch: int, skip: Ranges = (), rank: int = 0, world: int = 1
    ) -> None:
        if min(batch_sequences, micro_batch) < 1 or batch_sequences % (micro_batch * world):
            raise ValueError(
                f"train.micro_batch: {batch_sequences} sequences cannot be cut "
                f"into micro-batches of {micro_batch} on {world} data ranks"
            )
        assert 0 <= rank < world, (rank, world)
        self.batch_sequences = batch_sequences
        self.micro_batch = micro_batch
        self.skip = skip
        self.rank = rank
        self.world = world

    def batches(self, first_sample: int) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of one optimizer step after another, without end; a thread works ahead.

        first_sample: the data cursor, the first sample that no step before has passed.
        """
        return prefetch(self._steps(first_sample), STEPS_AHEAD)

    def step(self, first_sample: int) -> list[Batch]:
        """This rank's micro-batches of the step that reads the samples from `first_sample` on."""
        samples = self._samples(first_sample)
        stride = self.world * self.micro_batch
        firsts = range(self.rank * self.micro_batch, self.batch_sequences, stride)
        return [self._batch(samples[first : first + self.micro_batch]) for first in firsts]

    def after(self, first_sample: int) -> int:
        """The data cursor after the step that reads from `first_sample` on."""
        return int(self._samples(first_sample)[-1]) + 1

    def _steps(self, first_sample: int) -> Iterator[list[Batch]]:
        while True:
            yield self.step(first_sample)
            first_sample = self.after(first_sample)

    def _samples(self, first_sample: int) -> np.ndarray:
        return readable(first_sample, self.batch_sequences, self.skip)

    @abstractmethod
    def _batch(self, samples: np.ndarray) -> Batch:
        """The micro-batch of these samples [u]."""


class Loader(Batches):
    """Batches of windows of a text, in the order that `SampleOrder` fixes, for streams `StreamOrder`, for several texts
    `MixtureOrder`.

    documents: what becomes of a window that spans several documents.
        "concatenate": nothing, the text is one stream.
        "reset": each document stands alone. `positions` count from its start, or from the row's if it began
            earlier, so that a row depends on nothing outside it. `document_ends` is the index in the row one
            past the document's last token, more than T if it goes on after the row. A document's last token
            is unscored: its target belongs to another document.
    stream: each row goes on where it stopped one step before. Then positions of a document that began earlier count
        from there, or from the beginning of the row's lane.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        batch_sequences: int,
        micro_batch: int,
        seed: int,
        documents: str = "concatenate",
        stream: bool = False,
        skip: Ranges = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if documents not in DOCUMENTS:
            raise ValueError(f"data.documents: must be {' or '.join(DOCUMENTS)}, not {documents!r}")
        if stream and skip:
            raise ValueError("data.skip: the rows of data.stream read on, they leave nothing out")
        super().__init__(batch_sequences=batch_sequences, micro_batch=micro_batch, skip=skip, rank=rank, world=world)
        self.dataset = dataset
        self.order: SampleOrder | StreamOrder | MixtureOrder
        if isinstance(dataset, Mixture):
            assert not stream, "the texts of a mixture do not go on from each other"
            self.order = MixtureOrder.of(dataset, seq_len, seed)
        elif stream:
            self.order = StreamOrder(len(dataset.tokens), seq_len, batch_sequences)
        else:
            self.order = SampleOrder(len(dataset.tokens), seq_len, seed)
        self.seq_len = seq_len
        self.documents = documents

    def _batch(self, samples: np.ndarray) -> Batch:
        starts = self.order.starts(samples)
        windows = [self.dataset.tokens[start : start + self.seq_len + 1] for start in starts]
        rows = np.stack([np.asarray(window, dtype=np.int64) for window in windows])
        labels = rows[:, 1:].copy()
        positions = ends = None
        if self.documents == "reset":
            positions, ends = document_bounds(
                self.dataset.document_starts, starts, self.seq_len, self.order.since(samples)
            )
            labels[np.arange(1, self.seq_len + 1) >= ends] = UNSCORED
        crc = sum(zlib.crc32(row) for row in rows.astype("<u4")) % 2**32
        return Batch(
            torch.from_numpy(rows[:, :-1].copy()),
            torch.from_numpy(labels),
            None if positions is None else torch.from_numpy(positions),
            None if ends is None else torch.from_numpy(ends),
            tuple(samples.tolist()),
            self.order.begins(int(samples[0])),
            crc,
        )


def document_bounds(
    document_starts: np.ndarray, row_starts: np.ndarray, seq_len: int, since: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(positions, document_ends) int64 [b, T] of rows of `seq_len` tokens, as `Loader` defines them.

    document_starts int64 [D + 1], the last one the end of the stream; row_starts int64 [b]; since int64 [b]: the first
    token that the row, or its state, has read; default: those of the row.
    """
    since = (row_starts if since is None else since)[:, None]
    row_starts = row_starts[:, None]
    stream = row_starts + np.arange(seq_len)
    document = np.searchsorted(document_starts, stream, side="right") - 1
    positions = stream - np.maximum(document_starts[document], since)
    return positions, document_starts[document + 1] - row_starts
