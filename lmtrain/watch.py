"""What the mixers say of themselves on logged steps, as numbers: for metrics.jsonl and for TensorBoard."""

from __future__ import annotations

from typing import Any

import torch

Mixers = dict[str, dict[str, dict[str, float]]]
"""layer -> name in the pattern -> statistic -> number"""


def read(statistics: dict[Any, Any]) -> Mixers:
    """The scalar tensors in `Context.statistics` as numbers, without the mixers that report nothing.

    Waits for the device once.
    """
    said = [
        ((str(layer), mixer, name), value)
        for layer, mixers in statistics.items()
        for mixer, reported in mixers.items()
        for name, value in reported.items()
    ]
    found: Mixers = {}
    if said:
        numbers = torch.stack([value.double() for _, value in said]).tolist()
        for ((layer, mixer, name), _), number in zip(said, numbers, strict=True):
            found.setdefault(layer, {}).setdefault(mixer, {})[name] = number
    return found


def tags(mixers: Mixers) -> dict[str, float]:
    """The same under the names that TensorBoard shows: `mixer/<layer>/<mixer>/<statistic>`."""
    return {
        f"mixer/{layer}/{mixer}/{name}": number
        for layer, of_layer in mixers.items()
        for mixer, reported in of_layer.items()
        for name, number in reported.items()
    }
