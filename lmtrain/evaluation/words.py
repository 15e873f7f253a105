"""An evaluation in words: each number beside its protocol."""

import math

from lmtrain.evaluation.result import ONE_PASS, SAMPLING, Column, ContextLoss, Evaluation, Leak, Part, Protocol
from lmtrain.table import table

FEW = 3
"""Documents of each kind, the best and the worst, that are shown."""
TITLE = 60  # characters


def format_result(evaluation: Evaluation, by_document: bool = False) -> str:
    """The result for people: a few lines, each number beside its protocol; tables of what else was asked for."""
    p = evaluation.protocol
    words = evaluation.word_perplexity
    per_word = "" if words is None or math.isinf(words) else f", {words:.6g} per word"
    lines = [
        f"{p.corpus} {p.split}: {evaluation.bits_per_byte:.4f} bits per byte ({p.scoring}, {p.causality})",
        f"{evaluation.loss:.4f} nats per token ({p.tokenizer}); "
        f"perplexity {evaluation.token_perplexity:.6g} per token{per_word}",
        _what_was_scored(evaluation),
        _what_was_seen(p),
    ]
    if evaluation.leak is not None:
        lines += _what_was_drawn(evaluation.leak)
    else:
        buckets = "  ".join(f"{b.start}-{b.stop} {b.loss:.3f}" for b in evaluation.by_position)
        lines.append(f"nats per token by tokens seen: {buckets}")
    parts = ["\n  ".join(lines)]
    if evaluation.leak is not None:
        parts.append("\n".join(_three_columns(evaluation.leak, evaluation.columns)))
    if evaluation.by_context:
        parts.append(_by_context(evaluation.by_context))
    if by_document:
        parts.append(_by_document(evaluation.by_document))
    return "\n\n".join(parts)


def _by_context(losses: tuple[ContextLoss, ...]) -> str:
    head = ["context", "nats per token", "bits per byte", ""]
    rows = [
        [f"{c.context:,}", f"{c.loss:.4f}", f"{c.bits_per_byte:.4f}", "beyond training" if c.beyond_training else ""]
        for c in losses
    ]
    what = f"The same {losses[0].tokens:,} tokens, each seeing more than half of the context and at most all of it:"
    return f"{what}\n{table(head, rows)}"


def _by_document(documents: tuple[Part, ...]) -> str:
    """The best and the worst few, by bits per byte."""
    ranked = sorted((part for part in documents if part.bytes), key=lambda part: part.bits_per_byte or 0.0)
    few = len(ranked) <= 2 * FEW
    shown = ranked if few else [*ranked[:FEW], None, *ranked[-FEW:]]
    head = ["document", "bits per byte", "per word", "tokens", "bytes", "words"]
    of = "" if few else f", the best {FEW} and the worst {FEW} by bits per byte"
    return f"{len(ranked):,} documents{of}:\n" + table(head, [_document(part) for part in shown])


def _document(part: Part | None) -> list[str]:
    if part is None:
        return ["...", *[""] * 5]
    words = ["", ""] if part.word_perplexity is None else [f"{part.word_perplexity:.6g}", f"{part.words:,}"]
    title = "".join(c if c.isprintable() else " " for c in part.title)[:TITLE]
    return [title, f"{part.bits_per_byte:.4f}", words[0], f"{part.tokens:,}", f"{part.bytes:,}", words[1]]


def _three_columns(leak: Leak, columns: dict[str, Column]) -> list[str]:
    """The numbers of one pass, which nobody may quote, beside those that stand, and the gap; in all and by position."""
    head = ["", "one pass (leaks)", "prefix-wise", "gap", "standard error", "95 % interval"]
    columns = columns | {f"  of {p.start}-{p.stop} seen": p.column for p in leak.by_position}
    return [table(head, [[name, *column.cells()] for name, column in columns.items()]), "", ONE_PASS]


def _what_was_drawn(leak: Leak) -> list[str]:
    """Lines: how many prefixes, how they were drawn, and whose selection with which numbers made it necessary."""
    chosen = "; ".join(
        f"{name} is {settings['kind']} with "
        + ", ".join(f"{key} {value}" for key, value in settings.items() if type(value) is int)
        for name, settings in leak.selections.items()
    )
    lines = [f"prefix by prefix at {leak.prefixes:,} of them,", SAMPLING]
    return [*lines, f"{chosen}: the numbers of the config, for a prefix of any length"] if chosen else lines


def _what_was_scored(evaluation: Evaluation) -> str:
    p = evaluation.protocol
    first = "the first token" if p.documents == "concatenate" else "the first token of each document"
    words = "" if evaluation.words is None else f", {evaluation.words:,} words"
    what = "the whole split" if p.whole_split else "the beginning of the split"
    return f"scored {evaluation.scored_tokens:,} tokens, {evaluation.bytes:,} bytes{words}, {what} but {first}"


def _what_was_seen(p: Protocol) -> str:
    text = "one stream" if p.documents == "concatenate" else "each document alone"
    if p.context is None or p.stride is None:
        return f"{text}, state carried, nothing read twice; no key outlives {p.carry:,} tokens"
    if p.stride == p.context:
        return f"{text} in disjoint windows: a token sees from 1 to {p.context:,} before it"
    least = p.context - p.stride + 1
    return (
        f"{text} in windows of {p.context:,}, {p.stride:,} new ones each: a token sees from {least:,} "
        f"(or all there are) to {p.context:,} before it"
    )
