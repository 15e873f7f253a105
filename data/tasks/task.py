"""The contract of a synthetic task, and the registry of all of them: examples whose right answers are known.

A new task is one file in this folder: a frozen dataclass with `@register(name)` whose fields are its settings.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from data.numbers import NumberTokenizer
from data.tasks.draws import Draws
from data.tokenizer import Tokenizer


class Examples(NamedTuple):
    """B examples of T tokens, both int64 [B, T]. labels: what the model is to say at each token, or -100."""

    tokens: np.ndarray
    labels: np.ndarray


class Task(ABC):
    """What a model is to learn: the settings are the fields, and `examples` the definition."""

    name: ClassVar[str]
    vocab_size: int
    """Token ids are below it."""

    @abstractmethod
    def problems(self, length: int) -> list[tuple[str, str]]:
        """Every (setting, message) that makes examples of `length` tokens impossible."""

    @abstractmethod
    def examples(self, draws: Draws, length: int) -> Examples:
        """An example of `length` tokens for each row of `draws`; the settings have no problems."""

    @property
    def tokenizer(self) -> Tokenizer:
        """How people write these tokens."""
        return NumberTokenizer(self.vocab_size)

    def variants(self) -> list[Task]:
        """What a table of results shows side by side: this task, unless a setting that was left open matters."""
        return [self]

    def title(self, *lengths: int) -> str:
        """What a result must be called: the name with all settings, as `mqar-v256-k16-t256`."""
        marks = {field.metadata["mark"]: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        told = [f"{mark}{value:g}" for mark, value in marks.items() if value is not None]
        return "-".join([self.name, *told, "t" + "+".join(map(str, lengths))])


TASKS: dict[str, type[Any]] = {}


def register(name: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: make a task known as the corpus `name`."""

    def add(cls: type[Any]) -> type[Any]:
        assert name not in TASKS, f"two tasks are called {name}"
        cls.name = name
        TASKS[name] = cls
        return cls

    return add


def setting(
    default: Any, mark: str, meaning: str, *, at_least: float | None = None, at_most: float | None = None
) -> Any:
    """A field of a task: its default, the letter that it has in `title`, what it means, and its range."""
    return dataclasses.field(
        default=default, metadata={"mark": mark, "meaning": meaning, "at_least": at_least, "at_most": at_most}
    )
