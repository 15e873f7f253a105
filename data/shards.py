"""Preparation of token shards: each split of a corpus is tokenized once and kept in a cache folder.

A dataset appears under its name complete or not at all: it is written beside, flushed, and renamed.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.cache import default_cache, make_once, scratch
from data.corpus import Corpus
from data.dataset import VERSION, TokenDataset, open_dataset, sha256_json, write_dataset
from data.document import Split
from data.tokenizer import Tokenizer, token_dtype, tokenizer_hash

__all__ = ["TokenDataset", "default_cache", "prepare"]


def prepare(corpus: Corpus, split: str, tokenizer: Tokenizer, cache_dir: str | Path | None = None) -> TokenDataset:
    """The split in tokens: from the cache if it is there and intact, else made and cached.

    A damaged dataset in the cache is made anew, with a warning. Processes that need one at once make it once.
    cache_dir: None means `default_cache()`. ValueError if the text cannot be encoded or the cache not
    written.
    """
    text = corpus.split(split)
    cache = default_cache() if cache_dir is None else Path(cache_dir).expanduser()
    key = _cache_key(corpus.name, split, text, tokenizer)
    folder = cache / f"{corpus.name}-{split}-{tokenizer.name}-{key}"
    with suppress(ValueError):
        return open_dataset(folder)
    with _cache_errors(cache, text, tokenizer):
        make_once(
            folder,
            intact=lambda: _intact(folder),
            make=lambda temporary: write_dataset(temporary, corpus.name, split, text, tokenizer),
        )
    return open_dataset(folder)


def _intact(folder: Path) -> bool:
    """Whether the dataset is there; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        open_dataset(folder)
    except ValueError as error:
        warnings.warn(f"damaged cache, made anew: {error}", stacklevel=3)
        damaged = scratch(folder)
        with suppress(FileNotFoundError):  # removed by another process
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        return False
    return True


def _cache_key(corpus: str, split: str, text: Split, tokenizer: Tokenizer) -> str:
    """Changes with whatever may change the tokens; the split rule is in the byte ranges of the documents."""
    sources = [document.identity() for document in text.documents]
    return sha256_json([VERSION, corpus, split, tokenizer_hash(tokenizer), sources])[:16]


@contextmanager
def _cache_errors(cache: Path, text: Split, tokenizer: Tokenizer) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        needed = text.num_bytes * token_dtype(tokenizer.vocab_size).itemsize
        raise ValueError(
            f"data.cache: cannot write up to {needed:,} bytes into {cache} ({error.strerror}); "
            "choose another folder with data.cache or $LMTRAIN_CACHE"
        ) from error
