"""The texts of a mixture as data.mixture writes them: a weight, or a corpus with its settings and its weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attention.mixer import nearest, type_in_words
from data.corpora import CORPORA
from data.corpora.contract import Source
from lmtrain.config.values import hints_of

EXAMPLE = "{pg19: 0.7, mine: {corpus: text, path: notes, weight: 0.3}}"


@dataclass(frozen=True)
class Ingredient:
    """One text of a mixture; `settings` are those of its corpus."""

    corpus: str
    weight: float
    settings: Mapping[str, Any]


def ingredients(mixture: Mapping[str, Any]) -> dict[str, Ingredient]:
    """The texts by name. ValueError says all that is wrong with them, each by its key."""
    if not mixture:
        raise ValueError(f"the corpus mixture needs its texts and their weights: {EXAMPLE}")
    written = {name: {"weight": value} if _is_number(value) else value for name, value in mixture.items()}
    if problems := "; ".join(
        f"{name}{problem}" for name, value in written.items() for problem in _problems(name, value)
    ):
        raise ValueError(problems)
    found = {}
    for name, value in written.items():
        settings = {key: _as_source(key, item) for key, item in value.items() if key not in ("corpus", "weight")}
        found[name] = Ingredient(value.get("corpus", name), float(value["weight"]), settings)
    return found


def _problems(name: str, value: Any) -> Iterator[str]:
    """What is wrong with a text, each behind its key."""
    if not isinstance(value, dict):
        yield f": must be a weight, or a mapping such as those of {EXAMPLE}"
        return
    corpus = value.get("corpus", name)
    if corpus not in CORPORA:
        yield f".corpus: no corpus {corpus!r}{nearest(str(corpus), list(CORPORA))} ({', '.join(CORPORA)})"
    if not (_is_number(value.get("weight")) and 0 < value["weight"] < float("inf")):
        yield ".weight: must be a number > 0"
    known = CORPORA[corpus].settings if corpus in CORPORA else value
    for key, item in value.items():
        if key in ("corpus", "weight"):
            continue
        if key not in known:
            yield f".{key}: no such setting of {corpus} ({', '.join(['weight', *known])})"
        elif not isinstance(_as_source(key, item), hints_of(Source)[key]):
            yield f".{key}: must be {type_in_words(hints_of(Source)[key])}"


def _as_source(key: str, item: Any) -> Any:
    """Numbers where text is asked for are the text that was written: a share, a folder `1914`."""
    return str(item) if _is_number(item) and hints_of(Source)[key] is not int else item


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
