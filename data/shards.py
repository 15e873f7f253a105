"""Preparation of token shards: each split of a corpus is tokenized once and kept in a cache folder.

A dataset appears under its name complete or not at all: it is written beside, flushed, and renamed. Parts that are
tokenized wait in a folder of their own, so that who was interrupted goes on.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

from data.cache import cache_folder, default_cache, locked, open_or_make
from data.corpus import Corpus
from data.dataset import VERSION, TokenDataset, open_dataset, write_dataset
from data.disk import sha256_json
from data.document import Split
from data.parts import Watch
from data.tokenizer import Tokenizer, token_dtype, tokenizer_hash

__all__ = ["TokenDataset", "dataset_folder", "default_cache", "prepare"]


def prepare(
    corpus: Corpus,
    split: str,
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    *,
    workers: int = 0,
    watch: Watch = lambda done, total: None,
) -> TokenDataset:
    """The split in tokens: from the cache if it is there and intact, else made and cached.

    A damaged dataset in the cache is made anew, with a warning. Processes that need one at once make it once. One that
    was interrupted goes on: the same tokens, however often, and whatever the number of workers.
    cache_dir: None means `default_cache()`. workers: processes that tokenize, 0: this one. watch: told of the progress.
    ValueError if the text cannot be encoded or the cache not written.
    """
    text = corpus.split(split)
    folder = dataset_folder(corpus, split, tokenizer, cache_dir)
    parts = folder.with_name(f"{folder.name}.parts")

    def make(temporary: Path) -> None:
        with locked(parts) as alone:  # without locks, nobody else may know of our parts
            kept = parts if alone else None
            write_dataset(temporary, corpus.name, split, text, tokenizer, parts=kept, workers=workers, watch=watch)

    with _cache_errors(folder.parent, parts, text, tokenizer):
        dataset = open_or_make(folder, open_dataset, make)
    shutil.rmtree(parts, ignore_errors=True)
    return dataset


def dataset_folder(corpus: Corpus, split: str, tokenizer: Tokenizer, cache_dir: str | Path | None = None) -> Path:
    """Where `prepare` keeps the split. The name changes with whatever may change the tokens or what is said of them.

    The split rule is in the byte ranges of the documents.
    """
    sources = [document.identity() for document in corpus.split(split).documents]
    key = sha256_json([VERSION, corpus.name, split, tokenizer_hash(tokenizer), sources])[:16]
    return cache_folder(cache_dir) / f"{corpus.name}-{split}-{tokenizer.name}-{key}"


@contextmanager
def _cache_errors(cache: Path, parts: Path, text: Split, tokenizer: Tokenizer) -> Iterator[None]:
    """What keeps the cache from being written, in words. Finished parts stay, but for those of a text that is wrong."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            parts.rmdir()  # if nothing is finished
        kept = f" (the part that is finished waits in {parts})" if parts.exists() else ""
        needed = 2 * text.num_bytes * token_dtype(tokenizer.vocab_size).itemsize
        raise ValueError(
            f"data.cache: cannot write up to {needed:,} bytes into {cache} ({error.strerror}){kept}; "
            "make room, or choose another folder with data.cache or $LMTRAIN_CACHE"
        ) from error
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenized was killed (is memory short?): run it again, with fewer workers; "
            "what is finished is kept"
        ) from error
    except ValueError:
        shutil.rmtree(parts, ignore_errors=True)
        raise
