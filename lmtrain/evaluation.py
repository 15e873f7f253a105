"""The result of an evaluation: its numbers, and the protocol without which they mean nothing.

docs/evaluation.md has the formulas. L is the sum of -ln p over the scored tokens, in nats.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lmtrain.files import replace_bytes

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
class Leak:
    """What a selection that sees later tokens gained in one pass.

    one_pass_nats: the L it claims. gap: mean of prefix-wise minus one-pass loss over `prefixes` sampled
    targets, in nats per token, with its standard error.
    """

    one_pass_nats: float
    gap: float
    standard_error: float
    prefixes: int


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
    def leaked_bits_per_byte(self) -> tuple[float, float, float] | None:
        """(one-pass bits per byte, gap, standard error of the gap) where the selection sees later tokens."""
        if self.leak is None:
            return None
        gap, error = self.leak.gap, self.leak.standard_error
        one_pass, tokens = self._per_byte(self.leak.one_pass_nats), self.scored_tokens
        return one_pass, self._per_byte(tokens * gap), self._per_byte(tokens * error)

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
        if self.leak is not None and self.leaked_bits_per_byte is not None:
            names = ("one_pass_bits_per_byte", "gap", "gap_standard_error")
            row |= dict(zip(names, self.leaked_bits_per_byte)) | {"prefixes": self.leak.prefixes}
        return _finite(row)

    @property
    def name(self) -> str:
        """A file name that says which text was scored, and how."""
        p = self.protocol
        how = f"carry{p.carry}" if p.context is None else f"context{p.context}-stride{p.stride}"
        part = "" if p.whole_split else f"-first{self.scored_tokens}"
        text = f"{p.corpus}-{p.split}-{p.fingerprint[:8]}"
        return re.sub(r"[^A-Za-z0-9_.-]", "_", f"{text}-{how}{part}")


def write_result(run: Path, evaluation: Evaluation, *, checkpoint: Path | None = None, step: int | None = None) -> Path:
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
    per_word = "" if words is None else f", {words:.6g} per word"
    lines = [
        f"{p.corpus} {p.split}: {evaluation.bits_per_byte:.4f} bits per byte ({p.scoring}, {p.causality})",
        f"{evaluation.loss:.4f} nats per token ({p.tokenizer}); "
        f"perplexity {evaluation.token_perplexity:.6g} per token{per_word}",
        _what_was_scored(evaluation),
        _what_was_seen(p),
    ]
    if evaluation.leaked_bits_per_byte is not None:
        one_pass, gap, error = evaluation.leaked_bits_per_byte
        lines.append(
            f"one pass would say {one_pass:.4f}, which is not a code length: its selection reads ahead; "
            f"the gap is {gap:.4f}, standard error {error:.4f}"
        )
    buckets = "  ".join(f"{b.start}-{b.stop} {b.loss:.3f}" for b in evaluation.by_position)
    return "\n  ".join([*lines, f"nats per token by tokens seen: {buckets}"])


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
