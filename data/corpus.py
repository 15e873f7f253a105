"""A corpus by its name: which bytes train, which validate, and what a result on them must be called."""

from typing import Any

from data.corpora import CORPORA
from data.corpora.contract import DEFAULT_VALIDATION, Corpus, Source

__all__ = ["CORPORA", "DEFAULT_VALIDATION", "Corpus", "Source", "load_corpus"]


def load_corpus(
    name: str, path: str | None = None, validation: str | float = DEFAULT_VALIDATION, **settings: Any
) -> Corpus:
    """The corpus of that name; `settings` are the other fields of `Source`.

    Plain files are read now only to check official ones and to measure compressed ones; what comes from archives,
    tables and the hub is taken over into the cache, once. ValueError says what is missing, empty, wrong or has no
    effect, and where it was looked for.
    """
    if name not in CORPORA:
        raise ValueError(f"data.corpus: no corpus {name!r}; known: {', '.join(CORPORA)}")
    source = Source(path, str(validation), **settings)
    for setting, value in vars(source).items():
        if value != getattr(Source, setting) and not reads(name, setting):
            raise ValueError(f"data.{setting}: has no effect on the corpus {name}, but {readers_of(setting)}")
    return CORPORA[name].load(source)


def reads(corpus: str, setting: str) -> bool:
    """Whether a setting has an effect on the corpus of that name."""
    return corpus in CORPORA and setting in (*CORPORA[corpus].settings, "cache")


def readers_of(setting: str) -> str:
    """Words for the corpora on which a setting has an effect."""
    return f"on {', '.join(name for name, kind in CORPORA.items() if setting in kind.settings)}"
