"""Examples of a task as plain lists."""

from collections.abc import Callable

import pytest

from data.tasks import TASKS, TaskDataset

Lists = list[tuple[list[int], list[int]]]


@pytest.fixture
def examples() -> Callable[..., Lists]:
    """examples("mqar", 64, pairs=4): (tokens, labels) of the first 200 test examples of 64 tokens."""

    def make(name: str, length: int, count: int = 200, **settings: float) -> Lists:
        made = TaskDataset(TASKS[name](**settings), "test", length).examples(0, count)
        return list(zip(made.tokens.tolist(), made.labels.tolist(), strict=True))

    return make
