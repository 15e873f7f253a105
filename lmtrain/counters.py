"""How far a run has come, in numbers. Every checkpoint keeps them, and a run goes on from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data.order import Ranges


@dataclass
class Counters:
    """step: updates so far, skipped ones too. samples: the data cursor, the first sample that no step has passed.
    tokens: trained on. skipped: updates; skips_in_a_row: those up to now. rollbacks: so many; unread: the samples that
    they left out, as ranges [first, last)."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skips_in_a_row: int = 0
    rollbacks: int = 0
    unread: Ranges = ()

    def count(self, samples: int, tokens: int, skipped: bool) -> None:
        """One more step, behind which the data cursor is `samples`."""
        self.step += 1
        self.samples = samples
        self.tokens += tokens
        self.skipped += skipped
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return asdict(self)

    def load(self, kept: Mapping[str, Any]) -> None:
        """Take over what `state` returned; `kept` has no `misfits`, and may have more in it."""
        kept = {**_NOT_YET, **kept}
        for name in _RIGHT:
            setattr(self, name, kept[name])
        self.unread = tuple((first, last) for first, last in kept["unread"])


def misfits(kept: Mapping[str, Any]) -> list[str]:
    """The counters that `kept` lacks, or has something else in the place of."""
    kept = {**_NOT_YET, **kept}
    return [name for name, is_right in _RIGHT.items() if not is_right(kept.get(name))]


def is_count(value: Any) -> bool:
    """Whether a value of JSON is a whole number that an int64 holds, and not below 0."""
    return type(value) is int and 0 <= value < 2**63


def _are_ranges(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_range, value))


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value)) and value[0] <= value[1]


_NOT_YET = {"rollbacks": 0, "unread": []}
"""Counters that checkpoints of earlier versions lack, and what they were then."""
_RIGHT: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "samples", "tokens", "skipped", "skips_in_a_row", "rollbacks"), is_count),
    "unread": _are_ranges,
}
"""What the JSON of each must be."""
