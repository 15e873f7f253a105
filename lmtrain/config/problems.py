"""What is wrong with what a user wrote: every problem at once, each with its place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class Problem:
    """One mistake: `where  key=value: message`.

    where: `file:line`, `command line` or `default`; a check that does not know leaves it empty, and `load`
    fills it in from the key, together with `value`, the text as it was written.
    """

    where: str
    key: str
    message: str
    value: str | None = None

    def __str__(self) -> str:
        return f"{self.where}  {self.statement}"

    @property
    def statement(self) -> str:
        """The problem without its place."""
        key = self.key if self.value is None else f"{self.key}={self.value}"
        return f"{printable(key)}: {printable(self.message, limit=1000)}"


class ConfigError(ValueError):
    """Everything that is wrong with a configuration; its text is one block, ready to be shown."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(problems, key=_place)
        super().__init__(self.problems)

    def __str__(self) -> str:
        width = max((len(problem.where) for problem in self.problems), default=0)
        lines = [f"{problem.where:<{width}}  {problem.statement}" for problem in self.problems]
        plural = "" if len(lines) == 1 else "s"
        return "\n".join([*lines, f"{len(lines)} problem{plural}; nothing was started."])


def printable(text: str, limit: int = 80) -> str:
    """The text on one line, control characters escaped, its middle left out if it is long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= limit else f"{line[: limit // 2]}...{line[-limit // 4 :]}"


def _place(problem: Problem) -> tuple[int, str, int]:
    """Files first, line by line, then the command line, then defaults."""
    if problem.where in (COMMAND_LINE, DEFAULT):
        return 1 + (problem.where == DEFAULT), "", 0
    file, _, line = problem.where.rpartition(":")
    return (0, file, int(line)) if line.isdigit() else (0, problem.where, 0)
