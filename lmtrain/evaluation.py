"""The result of an evaluation: its numbers, and the protocol without which they mean nothing.

docs/evaluation.md has the formulas. L is the sum of -ln p over the scored tokens, in nats.
"""

import json
import math
import re
import typing
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lmtrain.files import replace_bytes
from lmtrain.table import table

CONFIDENCE = 1.96
"""Standard errors to each side of an interval that holds the truth 95 times in 100."""

SAMPLING = "drawn without replacement, stratified by tokens seen in octaves, each in proportion to the root of its size"

ONE_PASS = (
    "one pass reads ahead: no code length, no perplexity, and no sampler reaches it; quote the prefix-wise number"
)

FIRST_TOKEN = {"concatenate": "unscored", "reset": "unscored in each document"}


@dataclass(frozen=True)
class Protocol:
    """How tokens were scored.

    documents: `concatenate` (one stream) or `reset` (each alone). context: most tokens that a scored one
    saw; stride: new targets per window; None if the state was carried. carry: then, the age in tokens that
    no key outlives. scored_range: of the split's tokens [first, stop), less first ones of documents if these
    are reset. whole_split: those are all.
    """

    corpus: str
    split: str
    fingerprint: str
    tokenizer: str
    documents: str
    scoring: Literal["one-pass", "prefix-wise", "carried"]
    causality: str
    scored_range: tuple[int, int]
    whole_split: bool
    context: int | None = None
    stride: int | None = None
    carry: int | None = None


@dataclass(frozen=True)
class Bucket:
    """Mean loss, in nats, of the targets that saw more than `start` and at most `stop` tokens."""

    start: int
    stop: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Column:
    """One number of a model that selects ahead, three times: claimed by one pass, prefix-wise, and their difference."""

    one_pass: float
    prefix_wise: float
    gap: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """Holds the true gap 95 times in 100."""
        half = CONFIDENCE * self.standard_error
        return self.gap - half, self.gap + half

    def cells(self) -> list[str]:
        """For people."""
        low, high = self.interval
        numbers = (self.one_pass, self.prefix_wise, self.gap, self.standard_error)
        return [*(f"{number:.4f}" for number in numbers), f"{low:.4f} to {high:.4f}"]


@dataclass(frozen=True)
class PositionLeak:
    """The `tokens` targets that saw more than `start` and at most `stop` tokens, of which `prefixes` were drawn.

    one_pass_loss: of all of them, in nats. gap: mean of prefix-wise minus one-pass loss over those drawn.
    """

    start: int
    stop: int
    tokens: int
    one_pass_loss: float
    gap: float
    gap_standard_error: float
    prefixes: int

    @property
    def column(self) -> Column:
        """Nats per token."""
        return Column(self.one_pass_loss, self.one_pass_loss + self.gap, self.gap, self.gap_standard_error)


@dataclass(frozen=True)
class Leak:
    """What a selection that sees later tokens gained in one pass.

    one_pass_nats: the L it claims. selections: name in the pattern -> settings, of the mixers that select ahead.
    """

    one_pass_nats: float
    by_position: tuple[PositionLeak, ...]
    selections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """All targets."""
        return sum(p.tokens for p in self.by_position)

    @property
    def prefixes(self) -> int:
        """Targets drawn."""
        return sum(p.prefixes for p in self.by_position)

    @property
    def gap(self) -> float:
        """Mean of prefix-wise minus one-pass loss over all targets, estimated, in nats per token."""
        return sum(p.tokens * p.gap for p in self.by_position) / self.tokens

    @property
    def standard_error(self) -> float:
        """Of the gap."""
        return math.hypot(*(p.tokens * p.gap_standard_error for p in self.by_position)) / self.tokens


@dataclass(frozen=True)
class Evaluation:
    """L (`nats`), its denominators and its protocol. bytes: of scored tokens; words: of the whole split."""

    protocol: Protocol
    nats: float
    scored_tokens: int
    bytes: int
    words: int
    by_position: tuple[Bucket, ...]
    leak: Leak | None = None

    @property
    def loss(self) -> float:
        """Nats per token: L / tokens."""
        return self.nats / self.scored_tokens

    @property
    def bits_per_byte(self) -> float:
        """L / (ln 2 x bytes)."""
        return self._per_byte(self.nats)

    @property
    def token_perplexity(self) -> float:
        """exp(L / tokens)."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """exp(L / words); None unless the whole split was scored, since words are counted on all of it."""
        return _exp(self.nats / self.words) if self.protocol.whole_split and self.words else None

    @property
    def columns(self) -> dict[str, Column]:
        """Bits per byte and nats per token in three columns, where the selection sees later tokens; else nothing."""
        if self.leak is None:
            return {}
        leak, tokens = self.leak, self.scored_tokens
        loss = Column(leak.one_pass_nats / tokens, self.loss, leak.gap, leak.standard_error)
        bits = Column(*(self._per_byte(tokens * number) for number in astuple(loss)))
        return {"bits per byte": bits, "nats per token": loss}

    def _per_byte(self, nats: float) -> float:
        return nats / (math.log(2) * self.bytes)

    def to_json(self, checkpoint: Path | str | None = None, step: int | None = None) -> dict[str, Any]:
        """The row of `eval --json`; a number that is not finite becomes null."""
        row: dict[str, Any] = {
            **asdict(self.protocol),
            "first_token": FIRST_TOKEN[self.protocol.documents],
            "bits_per_byte": self.bits_per_byte,
            "token_perplexity": self.token_perplexity,
            "word_perplexity": self.word_perplexity,
            "loss": self.loss,
            "scored_tokens": self.scored_tokens,
            "bytes": self.bytes,
            "words": self.words,
            "loss_by_position": [asdict(bucket) for bucket in self.by_position],
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "step": step,
        }
        if self.leak is not None:
            row |= _leak_row(self.leak, *self.columns.values())
        return _finite(row)

    @property
    def name(self) -> str:
        """A file name that says which text was scored, and how."""
        p = self.protocol
        how = f"carry{p.carry}" if p.context is None else f"context{p.context}-stride{p.stride}"
        part = "" if p.whole_split else f"-first{self.scored_tokens}"
        text = f"{p.corpus}-{p.split}-{p.fingerprint[:8]}"
        return re.sub(r"[^A-Za-z0-9_.-]", "_", f"{text}-{how}{part}")


class Result(typing.Protocol):
    """What can be kept: a text's `Evaluation`, or what a model recalled of a task."""

    @property
    def name(self) -> str: ...
    def to_json(self, checkpoint: Path | str | None = None, step: int | None = None) -> dict[str, Any]: ...


def write_result(run: Path, evaluation: Result, *, checkpoint: Path | None = None, step: int | None = None) -> Path:
    """Writes the row as `run/eval/<text>-<protocol>[-step<N>].json`, whole or not at all."""
    name = evaluation.name if step is None else f"{evaluation.name}-step{step}"
    path = Path(run) / "eval" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    replace_bytes(path, (json.dumps(evaluation.to_json(checkpoint, step), indent=1) + "\n").encode())
    return path


def format_result(evaluation: Evaluation) -> str:
    """The result for people: a few lines, each number beside its protocol."""
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
        drawn = "\n  ".join([*lines, *_what_was_drawn(evaluation.leak)])
        return "\n".join([drawn, "", *_three_columns(evaluation.leak, evaluation.columns)])
    buckets = "  ".join(f"{b.start}-{b.stop} {b.loss:.3f}" for b in evaluation.by_position)
    return "\n  ".join([*lines, f"nats per token by tokens seen: {buckets}"])


def _leak_row(leak: Leak, bits: Column, loss: Column) -> dict[str, Any]:
    """What the row of a model that selects ahead has besides."""
    return {
        "one_pass_bits_per_byte": bits.one_pass,
        "gap": bits.gap,
        "gap_standard_error": bits.standard_error,
        "gap_interval": bits.interval,
        "one_pass_loss": loss.one_pass,
        "loss_gap": loss.gap,
        "loss_gap_standard_error": loss.standard_error,
        "prefixes": leak.prefixes,
        "sampling": SAMPLING,
        "selections": leak.selections,
        "leak_by_position": [asdict(p) for p in leak.by_position],
    }


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
    what = f"{evaluation.words:,} words, the whole split" if p.whole_split else "the beginning of the split"
    return f"scored {evaluation.scored_tokens:,} tokens, {evaluation.bytes:,} bytes, {what} but {first}"


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


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _finite(value: Any) -> Any:
    """The same JSON value, with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
