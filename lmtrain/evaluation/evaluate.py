"""Scoring a text: in windows of bounded context, prefix by prefix, or with the mixers' states carried along.

Whatever the protocol, every target is scored exactly once: all tokens but the first of the stream (of each
document, if documents are isolated), since there is no start token to predict it from. Losses are nats,
summed in float64.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np

from data.dataset import TokenDataset
from data.windows import Window, windows
from lmtrain.evaluation.prefixes import Sample, Shapes
from lmtrain.evaluation.result import Bucket, Evaluation, Leak, Protocol
from lmtrain.evaluation.scoring import (
    Autocast,
    EvaluationStopped,
    Scorer,
    ShouldStop,
    Spans,
    Watch,
    evaluating,
    num_targets,
    poll,
    score_batch,
    spans_of,
)
from lmtrain.evaluation.tally import Tally
from lmtrain.model import DecoderLM
from parallel.world import ALONE, World

__all__ = ["Evaluation", "EvaluationStopped", "evaluate", "evaluate_carried"]


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
    first so many targets. batch_tokens, should_stop, watch, world: as of `Scorer`.

    The single pass of a model that selects ahead is no code length: such a model is scored prefix by prefix, at about
    `prefixes` sampled targets (`lmtrain.evaluation.prefixes`; None: as many as cost little). ValueError if nothing can
    be scored or the protocol is impossible.
    """
    if prefixes is not None and prefixes < 1:
        raise ValueError(f"--prefixes: at least 1 prefix, not {prefixes}")
    spans = spans_of(model, dataset, documents, max_tokens)
    strict = model.causality == "strict"
    scoring = "one-pass" if strict else "prefix-wise"
    protocol = _protocol(model, dataset, documents, spans, scoring=scoring, context=context, stride=stride)
    shapes = Shapes(_windows(spans, context, stride))
    scorer = Scorer(model, dataset, batch_tokens, should_stop, watch, world)
    tally, sample = _tally(dataset, protocol), None if strict else Sample(shapes, shapes.allot(prefixes))
    with evaluating(model), autocast():
        for scored in scorer.score(_windows(spans, context, stride), "one pass", shapes.tokens):
            tally.add(scored)
            if sample is not None:
                sample.add(scored)
        one_pass = tally.result(protocol)
        return one_pass if sample is None else _prefix_wise(one_pass, sample, scorer, _selections(model))


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
    spans = spans_of(model, dataset, documents, max_tokens)
    protocol = _protocol(model, dataset, documents, spans, scoring="carried", carry=carry)
    tally = _tally(dataset, protocol)
    with evaluating(model), autocast():
        for start, stop in spans:
            state = model.init_state(1, limit=carry)
            for first in range(start, stop - 1, seq_len):
                poll(should_stop)
                segment = Window(first, min(first + seq_len, stop - 1), first + 1)
                tally.add(score_batch(model, dataset, [segment], state), seen=first - start + 1)
    return tally.result(protocol)


def _prefix_wise(
    one_pass: Evaluation, sample: Sample, scorer: Scorer, selections: dict[str, dict[str, Any]]
) -> Evaluation:
    """Scores each sampled target by the last logit of a pass over what precedes it in its window alone.

    With the gap that the sample estimates (nats per token, prefix-wise minus one-pass) the prefix-wise L of N targets
    is the one-pass L + N gap: unbiased, and exact where nothing leaks, for then every difference is 0.
    """
    order = sample.in_order()
    windows = (sample.prefixes[i] for i in order)
    scored = scorer.score(windows, f"{len(order):,} prefixes", sample.tokens)
    alone = np.empty(len(order))
    alone[order] = np.concatenate([batch.losses[:, 0] for batch in scored])
    leak = Leak(one_pass.nats, sample.leaks(alone), selections)
    buckets = tuple(Bucket(p.start, p.stop, p.tokens, p.one_pass_loss + p.gap) for p in leak.by_position)
    nats = one_pass.nats + one_pass.scored_tokens * leak.gap
    return dataclasses.replace(one_pass, nats=nats, by_position=buckets, by_document=(), by_block=(), leak=leak)


def _selections(model: DecoderLM) -> dict[str, dict[str, Any]]:
    """Name in the pattern -> settings, of the mixers that select ahead."""
    ahead = {name for block in model.layers for name, mixer in block.items() if mixer.causality != "strict"}
    return {name: settings for name, settings in model.config.mixers.items() if name in ahead}


def _windows(spans: Spans, context: int, stride: int) -> Iterator[Window]:
    for start, stop in spans:
        for window in windows(stop - start, context, stride):
            yield Window(*(start + index for index in window))


def _protocol(model: DecoderLM, dataset: TokenDataset, documents: str, spans: Spans, **how: Any) -> Protocol:
    everything = spans_of(model, dataset, documents)
    return Protocol(
        corpus=dataset.corpus,
        split=dataset.split,
        fingerprint=dataset.fingerprint,
        tokenizer=dataset.tokenizer.name,
        documents=documents,
        causality=model.causality,
        scored_range=(spans[0][0] + 1, spans[-1][1]),
        whole_split=num_targets(spans) == num_targets(everything),
        **how,
    )


def _tally(dataset: TokenDataset, protocol: Protocol) -> Tally:
    return Tally(dataset, len(dataset.tokens) if protocol.whole_split else protocol.scored_range[1])
