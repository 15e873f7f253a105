"""Budget matching: the value of one free setting at which a run costs what its reference costs.

    match: {equal: flops, solve: model.mixers.far.heads, reference: {model.mixers.far: {kind: dense, heads: 4}}}

The largest value is taken that does not cost more than the reference, so what is left over is never bought.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lmtrain.config import Config
from lmtrain.sweep.cost import model_cost, paper_flops

Quantity = Literal["flops", "parameters", "state"]
Accounting = Literal["pairs", "paper"]
QUANTITIES: tuple[str, ...] = get_args(Quantity)
ACCOUNTINGS: tuple[str, ...] = get_args(Accounting)
CLOSE = 0.01
"""A larger part of the reference's cost left over is told."""


@dataclass(frozen=True)
class Match:
    """What is to be equal, and the whole-number setting that makes it so: from `least` to `most`, a multiple of
    `multiple`. accounting: of flops, by exact pairs or as in the paper on MoSA."""

    equal: Quantity
    solve: str
    least: int = 1
    most: int = 1 << 16
    multiple: int = 1
    accounting: Accounting = "pairs"


@dataclass(frozen=True)
class Solved:
    """The value found, what the reference costs and what the run then costs."""

    key: str
    value: int
    target: float
    reached: float

    @property
    def residual(self) -> float:
        """Of the cost, as a share of the reference's; at most 0."""
        return self.reached / self.target - 1

    @property
    def is_close(self) -> bool:
        """Whether the costs may be called equal."""
        return abs(self.residual) <= CLOSE


def solve(match: Match, config: Config, reference: Config) -> Solved:
    """The largest value of `match.solve` in `config` that costs no more than `reference`.

    ValueError if there is none, and by how much which bound misses; or if the cost does not grow with the setting.
    """
    unit = match.multiple
    target = cost_of(match, reference)

    def cost(value: int) -> float:
        return cost_of(match, with_value(config, match.solve, value * unit))

    low, high = -(-match.least // unit), match.most // unit
    if low > high:
        raise ValueError(f"no multiple of {unit} lies between match.least {match.least} and match.most {match.most}")
    at_low, at_high = cost(low), cost(high)
    if at_low >= at_high and low != high:
        raise ValueError(f"match.solve {match.solve}: {match.equal} do not grow with it here")
    if at_low > target:
        raise ValueError(_no_solution(match, "least", low * unit, at_low, target))
    if at_high < target * (1 - CLOSE):
        raise ValueError(_no_solution(match, "most", high * unit, at_high, target))
    value, reached = _largest(cost, (low, at_low), (high, at_high), target)
    return Solved(match.solve, value * unit, target, reached)


def cost_of(match: Match, config: Config) -> float:
    """What is to be equal: FLOPs of all training, parameters, or bytes of the decode state at data.seq_len."""
    length = config.data.seq_len
    if match.equal == "flops" and match.accounting == "paper":
        return training_flops(config, paper_flops(config.model, length))
    cost = model_cost(config).cost
    if match.equal == "flops":
        return training_flops(config, cost.flops)
    return cost.parameters if match.equal == "parameters" else cost.state_bytes


def training_flops(config: Config, forward: float) -> float:
    """FLOPs of all training: 3 x forward (of one sequence) x sequences."""
    return 3 * forward * config.batch_sequences * config.train.steps


def with_value(config: Config, key: str, value: Any) -> Config:
    """The configuration with one setting replaced: of a section, or of a mixer that it has. ValueError if it has no
    such setting."""
    section, _, name = key.partition(".")
    part: Any = getattr(config, section, None)
    if name.startswith("mixers.") and section == "model":
        mixer, _, setting = name.removeprefix("mixers.").partition(".")
        if setting not in config.model.mixers.get(mixer, {}):
            raise ValueError(f"match.solve {key}: this run has no such setting")
        mixers = copy.deepcopy(config.model.mixers)
        mixers[mixer][setting] = value
        return replace(config, model=replace(config.model, mixers=mixers))
    if not hasattr(part, name):
        raise ValueError(f"match.solve {key}: no such setting")
    changed: Any = {section: replace(part, **{name: value})}
    return replace(config, **changed)


def _largest(
    cost: Callable[[int], float], low: tuple[int, float], high: tuple[int, float], target: float
) -> tuple[int, float]:
    """The largest whole number whose cost is at most `target`, and its cost; low and high: (number, cost), low's is
    small enough. Most costs are nearly straight lines, so guesses along the line and halves take turns."""
    if high[1] <= target:
        return high
    straight = True
    while high[0] - low[0] > 1:
        (least, below), (most, above) = low, high
        middle = (least + most) // 2
        if straight:
            middle = least + int((most - least) * (target - below) / (above - below))
            middle = min(max(middle, least + 1), most - 1)
        straight = not straight or most - least < 8
        found = (middle, cost(middle))
        low, high = (found, high) if found[1] <= target else (low, found)
    return low


def _no_solution(match: Match, bound: str, value: int, reached: float, target: float) -> str:
    miss = abs(reached / target - 1)
    side = "above" if reached > target else "below"
    hint = f"; raise match.{bound}" if bound == "most" else f"; a lower match.{bound}, or less of what else costs"
    return (
        f"no solution: with {match.solve} at match.{bound} {value} {match.equal} are {reached:.4g}, "
        f"{miss:.1%} {side} the reference's {target:.4g}{hint}"
    )
