"""Hashes of what is on the disk, and flushing it there."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any


def sha256_file(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync_file(file: IO[bytes]) -> None:
    """Flushes what was written into a file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes the folder's list of names to disk, where the file system knows how to: then renames in it last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some network file systems say to a folder
            raise
    finally:
        os.close(descriptor)
