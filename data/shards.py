"""Preparation of token shards: each split of a corpus is tokenized once and kept in a cache folder.

A dataset appears under its name complete or not at all: it is written beside, flushed, and renamed.
"""

import errno
import fcntl
import os
import shutil
import socket
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.corpus import Corpus
from data.dataset import VERSION, TokenDataset, open_dataset, sha256_json, sync_folder, write_dataset
from data.document import Split
from data.tokenizer import Tokenizer, token_dtype, tokenizer_hash

__all__ = ["TokenDataset", "default_cache", "prepare"]


def default_cache() -> Path:
    """$LMTRAIN_CACHE, or ~/.cache/lmtrain."""
    return Path(os.environ.get("LMTRAIN_CACHE") or "~/.cache/lmtrain").expanduser()


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
    with _cache_errors(cache, text, tokenizer), _locked(folder) as alone:
        if alone:
            for abandoned in folder.parent.glob(f"{_scratch_prefix(folder)}*"):  # by a process that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
        if not _intact(folder):  # else another process has just made it
            _make(folder, corpus.name, split, text, tokenizer)
    return open_dataset(folder)


def _intact(folder: Path) -> bool:
    """Whether the dataset is there; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        open_dataset(folder)
    except ValueError as error:
        warnings.warn(f"damaged cache, made anew: {error}", stacklevel=3)
        damaged = _scratch(folder)
        with suppress(FileNotFoundError):  # removed by another process
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        return False
    return True


def _make(folder: Path, corpus: str, split: str, text: Split, tokenizer: Tokenizer) -> None:
    temporary = _scratch(folder)
    try:
        write_dataset(temporary, corpus, split, text, tokenizer)
        _commit(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cache_key(corpus: str, split: str, text: Split, tokenizer: Tokenizer) -> str:
    """Changes with whatever may change the tokens; the split rule is in the byte ranges of the documents."""
    sources = [document.identity() for document in text.documents]
    return sha256_json([VERSION, corpus, split, tokenizer_hash(tokenizer), sources])[:16]


def _commit(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        another_was_first = error.errno in (errno.ENOTEMPTY, errno.EEXIST)  # and its dataset serves as well
        if not another_was_first:
            raise
    sync_folder(folder.parent)


def _scratch(folder: Path) -> Path:
    return folder.with_name(_scratch_prefix(folder) + uuid.uuid4().hex[:8])


def _scratch_prefix(folder: Path) -> str:
    """Names the host: on a shared file system the lock may not reach the processes of other hosts."""
    return f"{folder.name}.tmp-{socket.gethostname()}-"


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """One process at a time makes a dataset. False where locks do not work: then all do, the first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


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
