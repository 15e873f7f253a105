"""Spikes: steps whose loss or gradient norm lies far above what is usual, by estimates that outliers do not move.

Usual is the median of the last WINDOW finite values. How far is far is measured in deviations: the median absolute
deviation (MAD) from it, times what makes it the standard deviation of normally distributed values. Of gradient norms
the logarithms are judged, for they vary by factors; a loss in nats is a logarithm already.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 128
LEAST = 32
"""Values that must be known before anything is called unusual."""
NORMAL = 1.4826
"""Standard deviation / MAD of a normal distribution."""
FINEST = 0.01
"""A deviation is so many nats at least: of values that hardly differ each would be far off."""
HEAVY = 2.0
"""A gradient norm must lie so many times as far off as a loss: 2 of 378 usual ones of a small model lay beyond 6
deviations, none beyond 8, and no loss beyond 1.4."""


class Usual:
    """The last WINDOW finite values of a number, in float64."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.values = deque(values, maxlen=WINDOW)

    def judge(self, value: float) -> float:
        """How many deviations `value` lies above the median, and know it from now on, if it is finite.

        0 if it is not finite, or fewer than LEAST values are known.
        """
        if not math.isfinite(value):
            return 0.0
        deviations = self._deviations(value) if len(self.values) >= LEAST else 0.0
        self.values.append(value)
        return deviations

    def _deviations(self, value: float) -> float:
        middle = median(self.values)
        spread = NORMAL * median(abs(known - middle) for known in self.values)
        return (value - middle) / max(spread, FINEST)


@dataclass(frozen=True)
class Verdict:
    """Deviations of a step's loss and gradient norm above what was usual before it."""

    loss: float
    grad_norm: float

    def beyond(self, limit: float) -> bool:
        """Whether it is a spike: the loss by more than `limit`, or the norm by more than HEAVY times it."""
        return self.loss > limit or self.grad_norm > HEAVY * limit


class Spikes:
    """Judges one step after another. Spikes become usual, too: where the loss stays on another level, this is the usual
    one after WINDOW / 2 steps."""

    def __init__(self) -> None:
        self.loss, self.grad_norm = Usual(), Usual()

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """How unusual the next step is."""
        return Verdict(self.loss.judge(loss), self.grad_norm.judge(_log(grad_norm)))

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, as JSON, which writes float64 exactly."""
        return {"loss": list(self.loss.values), "grad_norm": list(self.grad_norm.values)}

    @staticmethod
    def is_state(kept: Any) -> bool:
        """Whether a value of JSON is such a state."""
        return isinstance(kept, dict) and all(_are_finite(kept.get(key)) for key in ("loss", "grad_norm"))

    def load(self, kept: Mapping[str, Iterable[float]]) -> None:
        """Take over what `state` returned."""
        self.loss, self.grad_norm = Usual(kept["loss"]), Usual(kept["grad_norm"])


def _are_finite(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is float and math.isfinite(number) for number in value)


def _log(norm: float) -> float:
    return math.log(max(norm, sys.float_info.min)) if math.isfinite(norm) else norm
