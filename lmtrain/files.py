"""Files that survive a crash: whole or absent, and hashed while they are written or read.

POSIX only. A rename replaces its target in one step, and is durable once the folder is synced too.
"""

import hashlib
import os
import re
import secrets
import stat
from pathlib import Path

from data.disk import sync_file, sync_folder
from lmtrain import fault

CHUNK = 1 << 20  # bytes hashed and written at a time: they stay in a core's cache, as 8 MiB do not
TEMPORARY = re.compile(r".+\.tmp-[0-9a-f]{8}")  # full match: a file that some writer did not finish


def token() -> str:
    """Eight hexadecimal digits for a name nobody else has."""
    return secrets.token_hex(4)


def replace_bytes(path: Path, content: bytes) -> None:
    """Replaces the file at `path`, or creates it: a reader sees the old content or the new, no mixture."""
    temporary = path.with_name(f"{path.name}.tmp-{token()}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            sync_file(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class HashingWriter:
    """A new file of a checkpoint, durable when its `with` ends; `bytes` and `sha256()` of what it holds."""

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            self._hash.update(piece)
            fault.before_write(self._descriptor, piece)
            while piece:  # a disk that fills up may take a part
                piece = piece[os.write(self._descriptor, piece) :]
        self.bytes += len(view)

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> "HashingWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


class HashingReader:
    """A regular file, read from start to end; `size` in bytes, `sha256()` of what was read so far.

    Links, pipes and devices are refused with OSError: what a manifest names lies in its own folder.
    """

    def __init__(self, path: Path) -> None:
        self._hash = hashlib.sha256()
        # O_NONBLOCK: opening a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        status = os.fstat(descriptor)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise OSError(f"{path.name} is not a regular file")

    def read_into(self, buffer: memoryview) -> None:
        """Fills `buffer`; OSError if the file ends before."""
        view = buffer.cast("B")
        while view:
            count = self._file.readinto(view[:CHUNK])
            if not count:
                raise OSError("the file ended while it was read")
            self._hash.update(view[:count])
            view = view[count:]

    def read(self, size: int) -> bytes:
        """The next `size` bytes; OSError if the file ends before."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer))
        return bytes(buffer)

    def skim(self) -> None:
        """Hashes the rest of the file without keeping it."""
        while data := self._file.read(CHUNK):
            self._hash.update(data)

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> "HashingReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
