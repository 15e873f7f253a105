"""Text becomes values by the type of the setting: `010`, `on` and `1e3` stay text where text is asked for."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from attention.mixer import nearest, type_in_words
from lmtrain.config.reader import Node, read_flow

_NUMBER = re.compile(r"[+-]?(\d+(_\d+)*(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LEADING_ZERO = re.compile(r"[+-]?0[\d_]+", re.ASCII)
WHOLE_NUMBERS_BELOW = 2**31
"""No setting needs more; a length or count beyond is a slip, and int32 would not hold it."""


@functools.cache
def hints_of(settings: Any) -> dict[str, Any]:
    """The type of each setting of a dataclass."""
    return typing.get_type_hints(settings)


def read_value(node: Node, hint: Any) -> Any:
    """The node as a value of the type `hint`. Raises ValueError that says what was expected."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if node.value is None:
        if type(None) in options:
            return None
        raise ValueError(f"must be {in_words(hint)}, not null")
    others = [option for option in options if option is not type(None)]
    assert len(others) == 1, f"{hint} is a type that no setting has had so far"
    hint = others[0]
    if typing.get_origin(hint) is tuple:
        return _read_tuple(node, typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return _read_mapping(node)
    if not isinstance(node.value, str):
        kind = "mapping" if isinstance(node.value, dict) else "list"
        raise ValueError(f"must be {in_words(hint)}, not a {kind}")
    if typing.get_origin(hint) is Literal:
        return _read_choice(node.value, list(typing.get_args(hint)))
    return _READERS[hint](node.value)


def range_problem(setting: dataclasses.Field[Any], value: Any) -> str | None:
    """What keeps the value (or an element of it) out of the setting's range."""
    limits = range_in_words(setting)
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, int | float)]
    inside = all(_within(setting.metadata, number) for number in numbers if not isinstance(number, bool))
    return None if inside else f"{'each ' if isinstance(value, tuple) else ''}must be {limits}"


def range_in_words(setting: dataclasses.Field[Any]) -> str:
    """`>= 1`, `> 0`, `>= 0 and < 1`; empty if any value is allowed."""
    signs = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<"}
    limits = [(sign, setting.metadata.get(name)) for name, sign in signs.items()]
    return " and ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)


def in_words(hint: Any) -> str:
    """A type as a person would say it, for the types of our own schema too."""
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(typing.get_args(hint))} numbers, each"
    if typing.get_origin(hint) is dict:
        return "a mapping"
    return type_in_words(hint)


def _within(limits: Any, number: float) -> bool:
    least, above = limits.get("at_least"), limits.get("above")
    most, below = limits.get("at_most"), limits.get("below")
    return (
        (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    )


def _read_tuple(node: Node, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    items = (read_flow(node.value) if isinstance(node.value, str) else node).value
    if not isinstance(items, list) or len(items) != len(hints):
        raise ValueError(f"must be a list of {len(hints)} numbers, [a, b]")
    return tuple(read_value(item, hint) for item, hint in zip(items, hints, strict=True))


def _read_mapping(node: Node) -> dict[str, Any]:
    """A mapping whose types nobody knows here: scalars are what JSON would make of them."""
    value = _read_any(node)
    if not isinstance(value, dict):
        raise ValueError("must be a mapping, {name: value}")
    return value


def _read_any(node: Node) -> Any:
    if isinstance(node.value, str) and node.value[:1] in ("{", "["):  # written behind a key of the command line
        node = read_flow(node.value)
    if isinstance(node.value, dict):
        return {name: _read_any(child) for name, child in node.value.items()}
    if isinstance(node.value, list):
        return [_read_any(item) for item in node.value]
    if node.value is None or node.value in ("true", "false"):
        return None if node.value is None else node.value == "true"
    for read in (_read_int, _read_float):
        try:
            return read(node.value)
        except ValueError:
            pass
    return node.value


def _read_choice(text: str, choices: list[Any]) -> Any:
    if text not in choices:
        raise ValueError(f"must be {type_in_words(Literal[tuple(choices)])}{nearest(text, choices)}")
    return text


def _read_number(text: str, kind: str) -> Decimal:
    if text.strip("+-.").lower() in ("inf", "infinity", "nan"):
        raise ValueError(f"must be {kind}, and finite")
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"must be {kind}")
    if _LEADING_ZERO.fullmatch(text):
        raise ValueError(f"must be {kind} without a leading zero, which YAML takes for octal")
    try:
        number = Decimal(text.replace("_", ""))
    except InvalidOperation:
        raise ValueError(f"must be {kind} of a sensible size") from None
    return number


def _read_int(text: str) -> int:
    number = _read_number(text, "a whole number")
    if number.adjusted() > 30 or abs(number) >= WHOLE_NUMBERS_BELOW:
        raise ValueError("must be a whole number below 2^31")
    if number.adjusted() < -30 or number != number.to_integral_value():
        raise ValueError("must be a whole number")
    return int(number)


def _read_float(text: str) -> float:
    number = float(_read_number(text, "a number"))
    if not math.isfinite(number):
        raise ValueError("must be a number, and finite")
    return number


def _read_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def _read_str(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must be text, not empty and without control characters")
    return text


_READERS: dict[Any, Any] = {int: _read_int, float: _read_float, bool: _read_bool, str: _read_str}
