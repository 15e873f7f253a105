"""The result of an evaluation: its numbers, and the protocol without which they mean nothing.

docs/evaluation.md has the formulas. L is the sum of -ln p over the scored tokens, in nats.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lmtrain.files import replace_bytes
from lmtrain.run.rows import finite

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
class Part:
    """A document, or a block of the text: its scored tokens, their bytes and their L (`nats`).

    words: of the document, its first token included; None for blocks and for a document that was scored in part.
    """

    title: str
    tokens: int
    bytes: int
    words: int | None
    nats: float

    @property
    def bits_per_byte(self) -> float | None:
        """None if nothing of it was scored."""
        return self.nats / (math.log(2) * self.bytes) if self.bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """None where the words are not known, or none."""
        return _exp(self.nats / self.words) if self.words else None

    def to_json(self) -> dict[str, Any]:
        """Its row."""
        return asdict(self) | {"bits_per_byte": self.bits_per_byte, "word_perplexity": self.word_perplexity}


@dataclass(frozen=True)
class ContextLoss:
    """L (`nats`) of the same targets as at any other context, each of which saw more than half of `context` tokens.

    beyond_training: sequences of training were shorter.
    """

    context: int
    tokens: int
    bytes: int
    nats: float
    beyond_training: bool

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """L / (ln 2 x bytes)."""
        return self.nats / (math.log(2) * self.bytes)

    def to_json(self) -> dict[str, Any]:
        """Its row."""
        return asdict(self) | {"loss": self.loss, "bits_per_byte": self.bits_per_byte}


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
    """L (`nats`), its denominators and its protocol. bytes: of scored tokens.

    words: of the documents that were scored, first tokens included; None if one was scored in part. by_document: L is
    the sum of theirs; none for a model that selects ahead, of which a sample was scored. by_block: the text in blocks,
    where its documents are few.
    """

    protocol: Protocol
    nats: float
    scored_tokens: int
    bytes: int
    words: int | None
    by_position: tuple[Bucket, ...]
    by_document: tuple[Part, ...] = ()
    by_block: tuple[Part, ...] = ()
    by_context: tuple[ContextLoss, ...] = ()
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
        """exp(L / words); None where the words are not known, or none."""
        return _exp(self.nats / self.words) if self.words else None

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

    def to_json(self, source: Mapping[str, Any] | None = None, by_document: bool = False) -> dict[str, Any]:
        """The row of `eval --json`; a number that is not finite becomes null.

        source: what else belongs into it: the model's origin (`Restored.source`). by_document: with a row for each
        document, and for each block.
        """
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
        }
        if self.by_context:
            row["loss_by_context"] = [context.to_json() for context in self.by_context]
        if self.leak is not None:
            row |= _leak_row(self.leak, *self.columns.values())
        if by_document:
            row |= {"by_document": [part.to_json() for part in self.by_document]}
            row |= {"by_block": [part.to_json() for part in self.by_block]}
        return finite(row | dict(source or {}))

    @property
    def name(self) -> str:
        """A file name that says which text was scored, and how."""
        p = self.protocol
        how = f"carry{p.carry}" if p.context is None else f"context{p.context}-stride{p.stride}"
        part = "" if p.whole_split else f"-first{self.scored_tokens}"
        text = f"{p.corpus}-{p.split}-{p.fingerprint[:8]}"
        return re.sub(r"[^A-Za-z0-9_.-]", "_", f"{text}-{how}{part}")


def write_result(run: Path, name: str, row: Mapping[str, Any]) -> Path:
    """Writes `row` as `run/eval/<name>[-step<N>][-<what else is in it>].json`, whole or not at all."""
    step = "" if row.get("step") is None else f"-step{row['step']}"
    more = "".join(f"-{word}" for word, key in _MORE.items() if key in row)
    path = Path(run) / "eval" / f"{name}{step}{more}.json"
    path.parent.mkdir(exist_ok=True)
    replace_bytes(path, (json.dumps(row, indent=1) + "\n").encode())
    return path


_MORE = {"by-document": "by_document", "by-context": "loss_by_context"}


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


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
