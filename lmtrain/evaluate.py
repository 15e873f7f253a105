"""Scoring a text: in windows of bounded context, prefix by prefix, or with the mixers' states carried along.

Whatever the protocol, every target is scored exactly once: all tokens but the first of the stream (of each
document, if documents are isolated), since there is no start token to predict it from. Losses are nats,
summed in float64. B windows of one batch are scored at once, S targets of each: its last ones.

Several ranks share the batches of windows and tell each other the losses: each then adds up all of them, in the order
of one process, so the number is the same. All make equally many forward passes, whoever has no batch left repeats one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from data.dataset import TokenDataset
from data.windows import Window, windows
from lmtrain.evaluation import Bucket, Evaluation, Leak, Protocol, format_result, write_result
from lmtrain.loss import token_losses
from lmtrain.model import DecoderLM, ModelState
from lmtrain.prefixes import Sample, Shapes
from parallel.world import ALONE, World

__all__ = ["Evaluation", "EvaluationStopped", "evaluate", "evaluate_carried", "format_result", "write_result"]

BUCKET_EDGES = 64 << np.arange(32)

Autocast = Callable[[], AbstractContextManager[Any]]
ShouldStop = Callable[[], bool]
Watch = Callable[[str, int, int], None]
"""Called with what is going on, and how many tokens of how many are read."""
Spans = list[tuple[int, int]]


class EvaluationStopped(Exception):  # noqa: N818 - what was asked for is no error
    """`should_stop` said yes; there is no result."""


def evaluate(
    model: DecoderLM,
    dataset: TokenDataset,
    *,
    context: int,
    stride: int,
    documents: str = "concatenate",
    max_tokens: int | None = None,
    batch_tokens: int = 16384,
    prefixes: int | None = None,
    autocast: Autocast = nullcontext,
    should_stop: ShouldStop | None = None,
    watch: Watch = lambda what, done, total: None,
    world: World = ALONE,
) -> Evaluation:
    """Scores the split in windows of at most `context` tokens that end every `stride` (`data.windows`).

    documents: `concatenate`, or `reset`: no window crosses the border of a document. max_tokens: only the
    first so many targets. batch_tokens: of one forward pass, at most (but one window at least); it changes
    no number. should_stop: asked between batches; EvaluationStopped if it says yes. watch: told of each batch. world:
    the ranks that share the work; all call this.

    The single pass of a model that selects ahead is no code length: such a model is scored prefix by prefix, at about
    `prefixes` sampled targets (`lmtrain.prefixes`; None: as many as cost little). ValueError if nothing can be scored
    or the protocol is impossible.
    """
    if prefixes is not None and prefixes < 1:
        raise ValueError(f"--prefixes: at least 1 prefix, not {prefixes}")
    spans = _spans(model, dataset, documents, max_tokens)
    strict = model.causality == "strict"
    scoring = "one-pass" if strict else "prefix-wise"
    protocol = _protocol(model, dataset, documents, spans, scoring=scoring, context=context, stride=stride)
    shapes = Shapes(_windows(spans, context, stride))
    score = partial(
        _score, model, dataset, batch_tokens=batch_tokens, should_stop=should_stop, watch=watch, world=world
    )
    tally, sample = Tally(dataset), None if strict else Sample(shapes, shapes.allot(prefixes))
    with evaluating(model), autocast():
        for scored in score(_windows(spans, context, stride), what="one pass", tokens=shapes.tokens):
            tally.add(scored)
            if sample is not None:
                sample.add(scored)
        one_pass = tally.result(protocol)
        return one_pass if sample is None else _prefix_wise(one_pass, sample, score, _selections(model))


def evaluate_carried(
    model: DecoderLM,
    dataset: TokenDataset,
    *,
    seq_len: int,
    carry: int | None = None,
    documents: str = "concatenate",
    max_tokens: int | None = None,
    autocast: Autocast = nullcontext,
    should_stop: ShouldStop | None = None,
) -> Evaluation:
    """Scores the split in segments of `seq_len` tokens with the state carried on: nothing is read twice.

    carry: besides its mixer's own rule no key outlives so many tokens (default 4 segments), which bounds the
    state of every mixer. `reset`: each document begins with an empty state. The rest is as in `evaluate`.

    ValueError for a model that selects ahead, since it sees to the end of the segment, and for one with a
    table of positions, which the stream would run out of.
    """
    carry = 4 * seq_len if carry is None else carry
    if seq_len < 1 or carry < 1:
        raise ValueError(f"--carry: a segment and a key's life last 1 token at least, not {seq_len}, {carry}")
    if model.causality != "strict":
        raise ValueError("--carry: the model selects ahead within each segment; evaluate it without --carry")
    if model.positions is not None:
        raise ValueError("--carry: a stream runs out of model.learned_positions; evaluate without --carry")
    spans = _spans(model, dataset, documents, max_tokens)
    tally = Tally(dataset)
    with evaluating(model), autocast():
        for start, stop in spans:
            state = model.init_state(1, limit=carry)
            for first in range(start, stop - 1, seq_len):
                poll(should_stop)
                segment = Window(first, min(first + seq_len, stop - 1), first + 1)
                tally.add(_score_batch(model, dataset, [segment], state), seen=first - start + 1)
    return tally.result(_protocol(model, dataset, documents, spans, scoring="carried", carry=carry))


class Scored(NamedTuple):
    """Windows of equal shape, the token ids [B, S] of their targets, and losses [B, S] in nats, float64."""

    windows: list[Window]
    targets: np.ndarray
    losses: np.ndarray


class Tally:
    """Sums over the scored targets, by the number of tokens they saw."""

    def __init__(self, dataset: TokenDataset) -> None:
        self.words = dataset.words
        self.token_bytes = dataset.tokenizer.token_bytes
        self.bytes = 0
        self.nats = np.zeros(len(BUCKET_EDGES))
        self.tokens = np.zeros(len(BUCKET_EDGES), dtype=np.int64)

    def add(self, scored: Scored, seen: int | None = None) -> None:
        """Count a batch. A window's first target saw `seen` tokens, by default those of the window alone."""
        if seen is None:
            seen = scored.windows[0].first_scored - scored.windows[0].start
        num_windows, num_targets = scored.losses.shape
        bucket_S = np.searchsorted(BUCKET_EDGES, np.arange(seen, seen + num_targets))
        self.nats += np.bincount(bucket_S, scored.losses.sum(0), len(BUCKET_EDGES))
        self.tokens += num_windows * np.bincount(bucket_S, minlength=len(BUCKET_EDGES))
        self.bytes += int(self.token_bytes[scored.targets].sum())

    def buckets(self) -> tuple[Bucket, ...]:
        """The mean loss of each bucket that has targets."""
        edges = [0, *BUCKET_EDGES.tolist()]
        return tuple(
            Bucket(edges[i], edges[i + 1], int(self.tokens[i]), float(self.nats[i] / self.tokens[i]))
            for i in np.flatnonzero(self.tokens).tolist()
        )

    def result(self, protocol: Protocol) -> Evaluation:
        """The evaluation of what was counted."""
        return Evaluation(
            protocol,
            nats=float(self.nats.sum()),
            scored_tokens=int(self.tokens.sum()),
            bytes=self.bytes,
            words=self.words,
            by_position=self.buckets(),
        )


def _prefix_wise(
    one_pass: Evaluation, sample: Sample, score: Callable[..., Iterator[Scored]], selections: dict[str, dict[str, Any]]
) -> Evaluation:
    """Scores each sampled target by the last logit of a pass over what precedes it in its window alone.

    With the gap that the sample estimates (nats per token, prefix-wise minus one-pass) the prefix-wise L of N targets
    is the one-pass L + N gap: unbiased, and exact where nothing leaks, for then every difference is 0.
    """
    order = sample.in_order()
    windows = (sample.prefixes[i] for i in order)
    scored = score(windows, what=f"{len(order):,} prefixes", tokens=sample.tokens)
    alone = np.empty(len(order))
    alone[order] = np.concatenate([batch.losses[:, 0] for batch in scored])
    leak = Leak(one_pass.nats, sample.leaks(alone), selections)
    buckets = tuple(Bucket(p.start, p.stop, p.tokens, p.one_pass_loss + p.gap) for p in leak.by_position)
    nats = one_pass.nats + one_pass.scored_tokens * leak.gap
    return dataclasses.replace(one_pass, nats=nats, by_position=buckets, leak=leak)


def _selections(model: DecoderLM) -> dict[str, dict[str, Any]]:
    """Name in the pattern -> settings, of the mixers that select ahead."""
    ahead = {name for block in model.layers for name, mixer in block.items() if mixer.causality != "strict"}
    return {name: settings for name, settings in model.config.mixers.items() if name in ahead}


def _score(
    model: DecoderLM,
    dataset: TokenDataset,
    to_score: Iterable[Window],
    *,
    batch_tokens: int,
    should_stop: ShouldStop | None,
    watch: Watch,
    world: World,
    what: str,
    tokens: int,
) -> Iterator[Scored]:
    """Scores windows in their order; neighbours of equal shape make a batch. They hold so many `tokens` in all."""
    done = 0
    watch(what, done, tokens)
    batches = _batches(to_score, batch_tokens)
    while at_once := list(itertools.islice(batches, world.size)):
        poll(should_stop)
        for scored in _score_shared(model, dataset, at_once, world):
            yield scored
            done += sum(window.end - window.start for window in scored.windows)
            watch(what, done, tokens)


def _batches(to_score: Iterable[Window], batch_tokens: int) -> Iterator[list[Window]]:
    for shape, alike in itertools.groupby(to_score, lambda w: (w.end - w.start, w.end - w.first_scored)):
        while batch := list(itertools.islice(alike, max(1, batch_tokens // shape[0]))):
            yield batch


def _score_shared(model: DecoderLM, dataset: TokenDataset, batches: list[list[Window]], world: World) -> list[Scored]:
    """A batch for each rank, or fewer; every rank gets the losses of all of them."""
    mine = min(world.rank, len(batches) - 1)
    own = _score_batch(model, dataset, batches[mine])
    if world.size == 1:
        return [own]
    targets = [_rows(dataset, batch)[1] for batch in batches]
    losses = [torch.zeros(each.shape, dtype=torch.float64, device=world.device) for each in targets]
    if mine == world.rank:  # else it repeats what another rank tells
        losses[mine].copy_(torch.from_numpy(own.losses))
    world.sum_(losses)
    return [Scored(batch, each, told.cpu().numpy()) for batch, each, told in zip(batches, targets, losses, strict=True)]


def _score_batch(
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


def _rows(dataset: TokenDataset, batch: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of windows of equal shape, each with the target of its last one; and those of them to be scored."""
    rows = np.stack([dataset.tokens[w.start : w.end + 1] for w in batch])
    return rows, rows[:, batch[0].first_scored - batch[0].start :]


def _spans(model: DecoderLM, dataset: TokenDataset, documents: str, max_tokens: int | None) -> Spans:
    """Stretches [start, stop) of the split that are read as one, with `max_tokens` targets in all at most."""
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


def _num_targets(spans: Spans) -> int:
    return sum(stop - start - 1 for start, stop in spans)


def _windows(spans: Spans, context: int, stride: int) -> Iterator[Window]:
    for start, stop in spans:
        for window in windows(stop - start, context, stride):
            yield Window(*(start + index for index in window))


def _protocol(model: DecoderLM, dataset: TokenDataset, documents: str, spans: Spans, **how: Any) -> Protocol:
    everything = _spans(model, dataset, documents, None)
    return Protocol(
        corpus=dataset.corpus,
        split=dataset.split,
        fingerprint=dataset.fingerprint,
        tokenizer=dataset.tokenizer.name,
        documents=documents,
        causality=model.causality,
        scored_range=(spans[0][0] + 1, spans[-1][1]),
        whole_split=_num_targets(spans) == _num_targets(everything),
        **how,
    )


def poll(should_stop: ShouldStop | None) -> None:
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
