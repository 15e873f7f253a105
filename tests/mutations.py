"""Fuzzing: what somebody may have written into a file in place of what we wrote, and a test's budget for trying it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400]),
    st.floats(),
    st.sampled_from([0.5, 1e308]),
)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["../x", "/etc/passwd", "\ud800", "\0", "1", "null", "a" * 70_000])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
"""What JSON can say."""


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """The JSON `value` with one or two of its parts replaced, left out or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(value))
        if not places or draw(st.integers(0, 19)) == 0:
            return draw(VALUES)
        container, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "replace":
            container[key] = draw(VALUES)
        elif change == "remove":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[draw(TEXTS)] = container[key]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of each part; of a long list only the ends."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = sorted({*range(len(value))[:3], *range(len(value))[-3:]})
    else:
        return
    for key in keys:
        yield value, key
        yield from _places(value[key])


def refusal(work: Callable[[], Any]) -> str | None:
    """The words of the ValueError that `work` raises, None if it does not; any other error passes."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return None


def fuzz(strategy: st.SearchStrategy[Any], quick: int, thorough: int) -> Callable[..., Callable[..., None]]:
    """A test of (drawn, folder) with `quick` examples, the same ones each time; marked slow, with `thorough` ones."""

    def decorate(check: Callable[[Any, Path], None]) -> Callable[..., None]:
        budgets = [pytest.param(quick, id="quick"), pytest.param(thorough, id="thorough", marks=pytest.mark.slow)]

        @pytest.mark.parametrize("examples", budgets)
        def test(examples: int, tmp_path: Path) -> None:
            how = settings(
                max_examples=examples,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            how(given(strategy)(lambda drawn: check(drawn, tmp_path)))()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate
