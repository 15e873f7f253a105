"""The cache: folders made once, by one process at a time, that appear under their names complete or not at all."""

import errno
import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.dataset import sync_folder


def default_cache() -> Path:
    """$LMTRAIN_CACHE, or ~/.cache/lmtrain."""
    return Path(os.environ.get("LMTRAIN_CACHE") or "~/.cache/lmtrain").expanduser()


def make_once(folder: Path, intact: Callable[[], bool], make: Callable[[Path], None]) -> None:
    """Makes `folder` unless it is intact: `make` writes it under another name, then it is renamed.

    intact: whether the folder is there as it should be; asked once this process is alone, it removes what is not.
    """
    with _locked(folder) as alone:
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
def _locked(folder: Path) -> Iterator[bool]:
    """One process at a time makes a folder. False where locks do not work: then all do, the first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
