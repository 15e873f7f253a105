"""Two models on one text: is one better, or was it chance?

The same targets are scored by both, A and B, and the text is cut into units: its documents or, where these are few,
blocks of 2^16 bytes. What one unit costs says much about the unit, which both had to read; so the units are resampled
in pairs. Of the difference

    d = (sum of nats of A) / (sum of bytes of A) - (sum of nats of B) / (sum of bytes of B)

the interval holds the middle 95 % over `RESAMPLES` resamples of as many units, drawn with replacement. Both sums of
bytes are equal, but for what the first token of each tokenizer holds, which is not scored; so models of different
tokenizers compare, too.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import TokenDataset
from lmtrain.evaluation.tally import FEW_DOCUMENTS
from lmtrain.run.rows import finite

RESAMPLES = 2000
SEED = 0
FEW_UNITS = 30
"""Of fewer the interval is too narrow: of 10 it held the truth in 88 of 100 simulations."""
MAX_BYTES = 1 << 30  # of a kept result: one with a million documents has about 200 MB
CHUNK = 1 << 20  # tokens decoded at a time
DRAWN_AT_ONCE = 1 << 18  # units, in several resamples


@dataclass(frozen=True)
class Difference:
    """A minus B. low, high: the interval of 95 %. wrong_sign: share of the resamples that say the contrary."""

    value: float
    low: float
    high: float
    wrong_sign: float


@dataclass(frozen=True)
class Comparison:
    """How two models differ on one text.

    a, b: their rows of `eval --by-document`. unit: `document` or `block`; units: how many were resampled; better: on
    how many of them A lost less than B, per byte. nats_per_token: None where the tokenizers differ.
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    unit: str
    units: int
    better: int
    bits_per_byte: Difference
    nats_per_token: Difference | None

    def to_json(self) -> dict[str, Any]:
        """The object of `compare --json`; the rows without their documents."""
        rows = {
            name: {key: value for key, value in row.items() if key not in ("by_document", "by_block")}
            for name, row in (("a", self.a), ("b", self.b))
        }
        return finite(
            {
                "unit": self.unit,
                "units": self.units,
                "better": self.better,
                "bits_per_byte": asdict(self.bits_per_byte),
                "nats_per_token": None if self.nats_per_token is None else asdict(self.nats_per_token),
                "resamples": RESAMPLES,
                "seed": SEED,
                **rows,
            }
        )

    def format(self) -> str:
        """For people: both numbers, their difference, and what it is worth."""
        lines = [
            f"{name}  {row['bits_per_byte']:.4f} bits per byte  {_what(row)}"
            for name, row in (("A", self.a), ("B", self.b))
        ]
        lines.append(f"A - B = {_in_words(self.bits_per_byte, 'bits per byte')}")
        if self.nats_per_token is not None:
            lines.append(f"      = {_in_words(self.nats_per_token, 'nats per token')}")
        lines.append(
            f"A is better on {self.better:,} of {self.units:,} {self.unit}s of {self.a['corpus']} {self.a['split']}; "
            f"{RESAMPLES:,} resamples of them"
        )
        if self.units < FEW_UNITS:
            lines.append(f"fewer than {FEW_UNITS} {self.unit}s: the interval is too narrow")
        return "\n".join(lines)


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compares two rows of `eval --by-document`. ValueError says why they cannot be: other text, other targets."""
    if problems := _differences(a, b):
        raise ValueError("these two cannot be compared: " + "; ".join(problems))
    unit = "document" if len(a["by_document"]) >= FEW_DOCUMENTS else "block"
    nats, size, tokens = (
        np.array([[part[key] for part in row[f"by_{unit}"]] for row in (a, b)], dtype=float)
        for key in ("nats", "bytes", "tokens")
    )
    scored = (size > 0).all(0)  # not so a document of one token, if each is read alone
    nats, size, tokens = nats[:, scored], size[:, scored], tokens[:, scored]
    if nats.shape[1] < 2:
        raise ValueError(f"there is only one {unit} to compare by, which says nothing about chance; take a longer text")
    same_tokens = a["fingerprint"] == b["fingerprint"]
    return Comparison(
        a,
        b,
        unit,
        units=nats.shape[1],
        better=int((nats[0] / size[0] < nats[1] / size[1]).sum()),
        bits_per_byte=bootstrap(nats, size * math.log(2)),
        nats_per_token=bootstrap(nats, tokens) if same_tokens else None,
    )


def bootstrap(nats: np.ndarray, sizes: np.ndarray, seed: int = SEED) -> Difference:
    """The difference d of two models on U units, with its interval. nats, sizes: [2, U], of A and of B.

    The resamples are a function of seed and U alone.
    """
    units = nats.shape[1]
    value = _difference(nats.sum(1), sizes.sum(1))
    generator = np.random.Generator(np.random.Philox(key=seed))
    resamples = []
    at_once = max(1, DRAWN_AT_ONCE // units)
    for left in range(RESAMPLES, 0, -at_once):
        chosen = generator.integers(units, size=(min(left, at_once), units))
        resamples.append(_difference(nats[:, chosen].sum(2), sizes[:, chosen].sum(2)))
    drawn = np.concatenate(resamples)
    low, high = np.quantile(drawn, [0.025, 0.975])
    wrong = (drawn * value < 0).mean() + (drawn * value == 0).mean() / 2
    return Difference(float(value), float(low), float(high), float(wrong))


def read_row(path: Path) -> dict[str, Any]:
    """A result that `lmtrain eval --by-document` kept. ValueError if it is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes are too many for a result")
        row = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a result of lmtrain eval ({error})") from None
    if problem := _malformed(row):
        raise ValueError(f"{path}: {problem}")
    return row


def no_texts(task: str) -> str:
    """Why examples of a synthetic task are not compared here, and where their numbers are."""
    return (
        f"{task} is a synthetic task, and texts are compared; lmtrain eval RUN --on {task} of each run says its "
        "accuracy on the same held-out examples, with its standard error"
    )


def text_sha256(dataset: TokenDataset) -> str:
    """Identifies the text of a split and the borders of its documents, whatever the tokenizer."""
    digest = hashlib.sha256()
    for start, stop in itertools.pairwise(dataset.document_starts.tolist()):
        document = hashlib.sha256()
        for first in range(start, stop, CHUNK):
            document.update(dataset.tokenizer.decode(dataset.tokens[first : min(first + CHUNK, stop)]))
        digest.update(document.digest())
    return digest.hexdigest()


def _in_words(difference: Difference, unit: str) -> str:
    d = difference
    wrong = f"< {1 / RESAMPLES:g}" if d.wrong_sign == 0 else f"{d.wrong_sign:.2g}"
    return f"{d.value:+.4f} {unit}, 95 % interval {d.low:+.4f} to {d.high:+.4f}, wrong sign with probability {wrong}"


def _what(row: Mapping[str, Any]) -> str:
    """Which model, and how it was scored."""
    how = "state carried" if row["context"] is None else f"context {row['context']}, stride {row['stride']}"
    return f"{row.get('checkpoint')} ({row['tokenizer']}, {row['documents']}, {how})"


def _difference(nats: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of sums [2, ...] of A and of B."""
    return nats[0] / sizes[0] - nats[1] / sizes[1]


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Why not the same targets of the same text were scored by both; [] if they were."""
    found = []
    if a["text_sha256"] != b["text_sha256"]:
        texts = " and ".join(f"{row['corpus']} {row['split']} ({row['text_sha256'][:8]})" for row in (a, b))
        found.append(f"their texts differ, {texts}; score both on one with --on and --path")
    elif a["by_document"] and b["by_document"] and _counts(a) != _counts(b):
        found.append("they count other documents in the same text: one of them is damaged")
    if a["documents"] != b["documents"]:
        found.append(f"documents are {a['documents']} in one and {b['documents']} in the other")
    for name, row in (("first", a), ("second", b)):
        if not row["whole_split"]:
            found.append(f"of the {name} only a part of the text was scored")
        if not row["by_document"]:
            found.append(f"the {name} selects ahead: a sample of prefixes was scored, and no document whole")
        if row["bits_per_byte"] is None or any(part["nats"] is None for part in row["by_document"]):
            found.append(f"the {name} has losses that are not finite: its training diverged")
    return found


def _counts(row: Mapping[str, Any]) -> tuple[int, int]:
    """Documents and blocks."""
    return len(row["by_document"]), len(row["by_block"])


def _malformed(row: Any) -> str | None:
    """What a kept result lacks to be compared; None if nothing."""
    if isinstance(row, dict) and isinstance(row.get("task"), str):
        return no_texts(row["task"])
    if not isinstance(row, dict) or "by_document" not in row:
        return "has no numbers by document; make it with lmtrain eval --by-document"
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(row.get(key, ...), kind)]
    if wrong:
        return f"damaged: {', '.join(wrong)} missing, or not what lmtrain eval writes"
    for part in (*row["by_document"], *row["by_block"]):
        if not isinstance(part, dict) or not all(_is_count(part.get(key)) for key in ("bytes", "tokens")):
            return f"damaged: no tokens and bytes in {str(part)[:80]}"
        if part["bytes"] > 0 and part["tokens"] == 0:
            return f"damaged: bytes without tokens in {str(part)[:80]}"
        if part.get("nats", "") is not None and not _is_count(part.get("nats")):
            return f"damaged: no nats in {str(part)[:80]}"
    return None


_NEEDED: dict[str, Any] = dict.fromkeys(
    ("corpus", "split", "fingerprint", "text_sha256", "documents", "tokenizer"), str
) | {
    "whole_split": bool,
    "by_document": list,
    "by_block": list,
    "bits_per_byte": float | None,
    "context": int | None,
    "stride": int | None,
}


def _is_count(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63
