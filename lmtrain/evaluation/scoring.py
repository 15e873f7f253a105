"""Losses of chosen targets of a text: windows in, nats out, in batches and shared by ranks.

B windows of one batch are scored at once, S targets of each: its last ones. Losses are nats, float64.

Several ranks share the batches of windows and tell each other the losses: each then adds up all of them, in the order
of one process, so the numbers are the same. All make equally many forward passes; whoever has no batch left repeats
one.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from data.dataset import TokenDataset
from data.windows import Window
from lmtrain.loss import token_losses
from lmtrain.model import DecoderLM, ModelState
from parallel.world import ALONE, World

Autocast = Callable[[], AbstractContextManager[Any]]
ShouldStop = Callable[[], bool]
Watch = Callable[[str, int, int], None]
"""Called with what is going on, and how many tokens of how many are read."""
Spans = list[tuple[int, int]]


class EvaluationStopped(Exception):  # noqa: N818 - what was asked for is no error
    """`should_stop` said yes; there is no result."""


class Scored(NamedTuple):
    """Windows of equal shape, the token ids [B, S] of their targets, and losses [B, S] in nats, float64."""

    windows: list[Window]
    targets: np.ndarray
    losses: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """Where in the text the targets stand, int64 [B, S]."""
        first_B = np.array([window.first_scored for window in self.windows])
        return first_B[:, None] + np.arange(self.losses.shape[1])


@dataclass(frozen=True)
class Scorer:
    """A model that scores windows of a text.

    batch_tokens: of one forward pass, at most (but one window at least); it changes no number. should_stop: asked
    between batches; EvaluationStopped if it says yes. watch: told of each batch. world: the ranks that share the work;
    all make the same calls.
    """

    model: DecoderLM
    dataset: TokenDataset
    batch_tokens: int = 16384
    should_stop: ShouldStop | None = None
    watch: Watch = lambda what, done, total: None
    world: World = ALONE

    def score(self, windows: Iterable[Window], what: str, tokens: int) -> Iterator[Scored]:
        """Scores windows in their order; neighbours of equal shape make a batch. They hold so many `tokens` in all."""
        done = 0
        self.watch(what, done, tokens)
        batches = _batches(windows, self.batch_tokens)
        while at_once := list(itertools.islice(batches, self.world.size)):
            poll(self.should_stop)
            for scored in self._score_shared(at_once):
                yield scored
                done += sum(window.end - window.start for window in scored.windows)
                self.watch(what, done, tokens)

    def _score_shared(self, batches: list[list[Window]]) -> list[Scored]:
        """A batch for each rank, or fewer; every rank gets the losses of all of them."""
        world = self.world
        mine = min(world.rank, len(batches) - 1)
        own = score_batch(self.model, self.dataset, batches[mine])
        if world.size == 1:
            return [own]
        targets = [_rows(self.dataset, batch)[1] for batch in batches]
        losses = [torch.zeros(each.shape, dtype=torch.float64, device=world.device) for each in targets]
        if mine == world.rank:  # else it repeats what another rank tells
            losses[mine].copy_(torch.from_numpy(own.losses))
        world.sum_(losses)
        told = (each.cpu().numpy() for each in losses)
        return [Scored(*of) for of in zip(batches, targets, told, strict=True)]


def score_batch(
    model: DecoderLM, dataset: TokenDataset, batch: list[Window], state: ModelState | None = None
) -> Scored:
    """One forward pass over windows of equal shape; only the positions to be scored go through the head."""
    rows, scored = _rows(dataset, batch)
    tokens = torch.from_numpy(rows.astype(np.int64)).to(model.head_weight.device)
    num_targets = scored.shape[1]
    hidden_BSD = model.hidden(tokens[:, :-1], state=state).y[:, -num_targets:]
    targets = tokens[:, -num_targets:].flatten()
    losses = token_losses(hidden_BSD.flatten(0, 1), model.head_weight, targets).view(len(batch), -1)
    return Scored(batch, scored, losses.cpu().numpy().astype(np.float64))


def spans_of(model: DecoderLM, dataset: TokenDataset, documents: str, max_tokens: int | None = None) -> Spans:
    """Stretches [start, stop) of the split that are read as one, with `max_tokens` targets in all at most.

    documents: `concatenate`, one stream; or `reset`, each alone. ValueError if there is nothing to score, or the model
    does not know the tokens.
    """
    if documents not in ("concatenate", "reset"):
        raise ValueError(f"documents must be concatenate or reset, got {documents!r}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    vocabulary, known = dataset.tokenizer.vocab_size, len(model.head_weight)
    if vocabulary > known:
        raise ValueError(f"the model knows {known} tokens, {dataset.corpus} is written in {vocabulary}")
    borders = dataset.document_starts.tolist() if documents == "reset" else [0, len(dataset.tokens)]
    left = len(dataset.tokens) if max_tokens is None else max_tokens
    spans = []
    for start, border in itertools.pairwise(borders):
        stop = min(border, start + left + 1)
        if stop - start > 1:
            spans.append((start, stop))
            left -= stop - start - 1
    if not spans:
        raise ValueError(f"nothing to score in {dataset.corpus} {dataset.split}: no token has one before it")
    return spans


def num_targets(spans: Spans) -> int:
    """All tokens of the stretches but their first ones."""
    return sum(stop - start - 1 for start, stop in spans)


def poll(should_stop: ShouldStop | None) -> None:
    """EvaluationStopped if `should_stop` says yes."""
    if should_stop is not None and should_stop():
        raise EvaluationStopped


@contextmanager
def evaluating(model: DecoderLM) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards the mode it was in.

    Not inference mode: autograd would refuse in training what was remembered here (orders of keys, tables).
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _batches(windows: Iterable[Window], batch_tokens: int) -> Iterator[list[Window]]:
    for shape, alike in itertools.groupby(windows, lambda w: (w.end - w.start, w.end - w.first_scored)):
        while batch := list(itertools.islice(alike, max(1, batch_tokens // shape[0]))):
            yield batch


def _rows(dataset: TokenDataset, batch: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of windows of equal shape, each with the target of its last one; and those of them to be scored."""
    rows = np.stack([dataset.tokens[w.start : w.end + 1] for w in batch])
    return rows, rows[:, batch[0].first_scored - batch[0].start :]
