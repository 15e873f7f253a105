"""The combinations of a sweep's axes that its constraints allow."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

from lmtrain.config import Config, Problem, to_dict
from lmtrain.sweep.spec import Choice, Constraint, Label, Spec

SIGNS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
MISSING = object()


def combinations(spec: Spec) -> Iterator[dict[str, Choice]]:
    """Each combination of choices by axis, the last axis fastest, but for those that a constraint on axes rules out."""
    names = [axis.name for axis in spec.axes]
    for choices in itertools.product(*(axis.choices for axis in spec.axes)):
        chosen = dict(zip(names, choices))
        labels = {name: choice.label for name, choice in chosen.items()}
        if allowed(spec, labels, None):
            yield chosen


def allowed(spec: Spec, labels: dict[str, Label], config: Config | None) -> bool:
    """Whether no constraint rules the combination out: those on axes alone, and with a configuration all others too.

    A constraint over a setting that a run does not have does not concern it.
    """
    values = None if config is None or not spec.constraints else to_dict(config)
    for constraint in spec.constraints:
        left, right = (_value(side, labels, values) for side in (constraint.left, constraint.right))
        if MISSING not in (left, right) and not _holds(constraint, left, right):
            return False
    return True


def constraint_problems(spec: Spec, configs: list[Config]) -> list[Problem]:
    """Constraints whose left side is neither an axis nor a setting of any run, or is what matching solves for."""
    found, names = [], [axis.name for axis in spec.axes]
    trees = [to_dict(config) for config in configs] if spec.constraints else []
    for constraint in spec.constraints:
        left = constraint.left
        if spec.match is not None and spec.match.solve in (left, constraint.right):
            message = f"{spec.match.solve} is what match solves for: bound it by match.least and match.most"
            found.append(Problem(constraint.where, f"constraints: {constraint}", message))
        elif left not in names and all(_at(tree, left) is MISSING for tree in trees):
            message = f"{left} is no axis ({', '.join(names) or 'there is none'}), nor a setting of any run"
            found.append(Problem(constraint.where, f"constraints: {constraint}", message))
    return found


def _value(side: str, labels: dict[str, Label], values: dict[str, Any] | None) -> Any:
    """The label on an axis, the value of a setting, or the word or number itself."""
    if side in labels:
        return labels[side]
    number = _number(side)
    if number is not None:
        return number
    return side if "." not in side else MISSING if values is None else _at(values, side)


def _holds(constraint: Constraint, left: Any, right: Any) -> bool:
    if constraint.sign in ("==", "!="):
        return SIGNS[constraint.sign](left, right) or SIGNS[constraint.sign](str(left), str(right)) is True
    numbers = all(isinstance(side, int | float) for side in (left, right))
    return bool(SIGNS[constraint.sign](left, right)) if numbers else True


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not (isinstance(values, dict) and part in values):
            return MISSING
        values = values[part]
    return values


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
