"""The cache: folders made once, by one process at a time, that appear under their names complete or not at all."""

import errno
import fcntl
import os
import shutil
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from data.disk import sync_folder

Opened = TypeVar("Opened")


def default_cache() -> Path:
    """$LMTRAIN_CACHE, or ~/.cache/lmtrain."""
    return Path(os.environ.get("LMTRAIN_CACHE") or "~/.cache/lmtrain").expanduser()


def cache_folder(chosen: str | Path | None) -> Path:
    """The folder that was chosen; None: `default_cache()`."""
    return default_cache() if chosen is None else Path(chosen).expanduser()


def open_or_make(folder: Path, open_folder: Callable[[Path], Opened], make: Callable[[Path], None]) -> Opened:
    """What `open_folder` opens; where it raises ValueError, the folder is made first (`make_once`).

    A folder that is there and cannot be opened is damaged: it is made anew, with a warning.
    """

    def intact() -> bool:
        if not folder.exists():
            return False
        try:
            open_folder(folder)
        except ValueError as error:
            warnings.warn(f"damaged cache, made anew: {error}", stacklevel=4)
            damaged = scratch(folder)
            with suppress(FileNotFoundError):  # removed by another process
                folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
            return False
        return True

    with suppress(ValueError):
        return open_folder(folder)
    make_once(folder, intact, make)
    return open_folder(folder)


def make_once(folder: Path, intact: Callable[[], bool], make: Callable[[Path], None]) -> None:
    """Makes `folder` unless it is intact: `make` writes it under another name, then it is renamed.

    intact: whether the folder is there as it should be; asked once this process is alone, it removes what is not.
    """
    with locked(folder) as alone:
        if alone:
            for abandoned in folder.parent.glob(f"{_scratch_prefix(folder)}*"):  # by a process that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
        if not intact():  # else another process has just made it
            temporary = scratch(folder)
            try:
                make(temporary)
                _commit(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def scratch(folder: Path) -> Path:
    """A name beside `folder` that nobody else has."""
    return folder.with_name(_scratch_prefix(folder) + uuid.uuid4().hex[:8])


def _scratch_prefix(folder: Path) -> str:
    """Names the host: on a shared file system the lock may not reach the processes of other hosts."""
    return f"{folder.name}.tmp-{socket.gethostname()}-"


def _commit(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        another_was_first = error.errno in (errno.ENOTEMPTY, errno.EEXIST)  # and its folder serves as well
        if not another_was_first:
            raise
    sync_folder(folder.parent)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """One process at a time makes a folder. False where locks do not work: then all do, the first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
