"""What a corpus is, and the settings that say where its text comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data.document import Split

DEFAULT_VALIDATION = "0.1"
DEFAULT_ALPHABET = 4
DEFAULT_COLUMN = "text"
DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class Corpus:
    """`name`: what a result must be called (a prefix of enwik8 is not enwik8). `splits`: split name -> text.

    Every corpus has `all`, and of `train`, `validation` and `test` those that its text has; no byte of a file is in two
    splits but for `all`. absent: why a split that one may expect is missing. notes: what a reader of its numbers should
    know, a sentence each.
    """

    name: str
    splits: Mapping[str, Split]
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> Split:
        """The split of that name; ValueError if there is none or it is empty."""
        if name not in self.splits:
            why = f": {self.absent[name]}" if name in self.absent else ""
            raise ValueError(f"corpus {self.name} has no split {name!r}; it has {', '.join(self.splits)}{why}")
        if not self.splits[name].num_bytes:
            raise ValueError(f"corpus {self.name}: the text is too short, nothing is left for the split {name!r}")
        return self.splits[name]


@dataclass(frozen=True)
class Source:
    """Where the text of a corpus lies and how it is cut: the settings `data.*` of the same names.

    path: a file, folder or pattern, looked up in the current folder, then in $LMTRAIN_DATA; or what the corpus says.
    validation: the share of the text, at its end, that validates; or the path of a text, or the name of a split.
    alphabet: letters of the corpus `iid`.
    column: of a table, the one that holds the text.
    subset, split, revision, streaming: of a dataset of the hub; `split` is the one that trains.
    cache: where texts that are taken out of archives and tables are kept; None means `default_cache()`.
    """

    path: str | None = None
    validation: str = DEFAULT_VALIDATION
    alphabet: int = DEFAULT_ALPHABET
    column: str = DEFAULT_COLUMN
    subset: str | None = None
    split: str = DEFAULT_SPLIT
    revision: str | None = None
    streaming: bool = False
    cache: str | Path | None = None


@dataclass(frozen=True)
class CorpusKind:
    """load: makes the corpus; ValueError says what is missing, empty or wrong, and where it was looked for.

    settings: those of `Source` that it reads, beside `cache`.
    """

    load: Callable[[Source], Corpus]
    settings: tuple[str, ...]
