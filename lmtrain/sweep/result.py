"""What a finished run of a sweep leaves behind, `result.json`, and a failed one, `failure.json`."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from attention.mixer import type_in_words
from lmtrain.files import replace_bytes

VERSION = 1
"""Of both files; one of another version is refused."""


class _Record:
    """A dataclass that is read from JSON strictly, and written to it."""

    FILE: typing.ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """For machines, with the version."""
        assert dataclasses.is_dataclass(self)
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Any, where: str | Path = "") -> Self:
        """The record that `content` states. ValueError names `where` and everything that is wrong with it."""
        found = content.get("version") if isinstance(content, dict) else None
        if found != VERSION:
            raise ValueError(
                f"{where or cls.FILE}: of version {found!r}, this lmtrain reads {VERSION}; choose another folder"
            )
        hints = typing.get_type_hints(cls)
        fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        problems = [f"{name} is missing" for name in fields if name not in content]
        problems += [f"{name} is unknown" for name in content if name not in fields and name != "version"]
        problems += [
            f"{name} must be {_in_words(hint)}, got {content[name]!r}"
            for name, hint in fields.items()
            if name in content and not _fits(content[name], hint)
        ]
        if problems:
            raise ValueError(f"{where or cls.FILE}: {'; '.join(problems)}")
        return cls(**{name: content[name] for name in fields})

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in a run's folder; None if there is none. ValueError if it cannot be read."""
        path = folder / cls.FILE
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not readable: {error}") from None
        return cls.from_json(content, path)

    def write(self, folder: Path) -> None:
        """Put the record into a run's folder, whole or not at all."""
        replace_bytes(folder / self.FILE, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class RunResult(_Record):
    """One finished run.

    name, hash: of the run in its sweep, and of its configuration; axes: axis -> value; mixer: the label of the axis
    that chooses it, "" if none does. parameters: without the embeddings, parameters_total: with them; tokens: of
    training; flops: of all training, 3 x forward x tokens, flops_per_token and pairs: of a forward pass of seq_len
    tokens, per token. loss: validation, nats per token; sparsity: seq_len / keep. seconds: wall of training;
    peak_memory: bytes; state_bytes: length -> bytes, at least at 65536. parent: the run that this one forked from;
    group: the trunk of all forks that share tokens, else the run itself.
    """

    FILE = "result.json"

    name: str
    hash: str
    axes: dict[str, Any]
    mixer: str
    seed: int
    parameters: int
    parameters_total: int
    tokens: int
    flops: float
    flops_per_token: float
    pairs: float
    loss: float
    bits_per_byte: float | None
    sparsity: float | None
    strict: bool
    seconds: float
    tokens_per_second: float
    peak_memory: int
    state_bytes: dict[str, float]
    parent: str | None
    group: str
    scoring: Literal["one-pass", "prefix-wise"]
    command: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class RunFailure(_Record):
    """One run that was given up: after how many attempts, why, the last exit code (None: it was killed at its time
    limit), and the file that holds what it said."""

    FILE = "failure.json"

    name: str
    hash: str
    axes: dict[str, Any]
    attempts: int
    reason: str
    exit_code: int | None
    log: str


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        _, of = typing.get_args(hint)
        return isinstance(value, dict) and (of is Any or all(_fits(item, of) for item in value.values()))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) is dict:
        return "a mapping" if typing.get_args(hint)[1] is Any else f"a mapping to {_in_words(typing.get_args(hint)[1])}"
    return type_in_words(hint)
