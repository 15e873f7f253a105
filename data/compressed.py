"""Files that may be compressed, read as the text inside; whatever is wrong with one is said with its name."""

import gzip
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def _zstd() -> Any:
    """Python's own module from 3.14 on, or its backport; None if there is neither."""
    for name in ("compression.zstd", "backports.zstd"):
        with suppress(ImportError):
            return importlib.import_module(name)
    return None


ZSTD = _zstd()


def _open_zst(path: Path) -> Any:
    if ZSTD is None:
        raise ValueError(f"{path}: to read .zst files, pip install backports.zstd or take Python 3.14 or newer")
    return ZSTD.open(path)


_OPEN: dict[str, Callable[[Path], Any]] = {".xz": lzma.open, ".gz": gzip.open, ".zst": _open_zst}
_DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, *([ZSTD.ZstdError] if ZSTD else []))


def is_compressed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix in _OPEN


@contextmanager
def reading(path: Path) -> Iterator[IO[bytes]]:
    """The file as bytes, decompressed if it is named .xz, .gz or .zst. ValueError if it is damaged or refused."""
    try:
        with _OPEN[path.suffix](path) if is_compressed(path) else path.open("rb") as file:
            yield file
    except _DAMAGE as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
