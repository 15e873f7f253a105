"""Finding a user's files: in the current folder, then in $LMTRAIN_DATA."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.document import file_status


def find_file(names: Iterable[str]) -> Path | None:
    """The first of the names that is a file, or None."""
    candidates = (folder / os.path.expanduser(name) for folder in search_folders() for name in names)
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def find_folder(path: str) -> Path | None:
    """The folder of that name, or None."""
    candidates = (folder / os.path.expanduser(path) for folder in search_folders())
    return next((candidate for candidate in candidates if os.path.isdir(candidate)), None)


def find_files(path: str, key: str) -> list[Path]:
    """The files that `path` means: itself, all but the hidden below a folder, or the matches of a pattern.

    Sorted by path; what links lead to twice is listed once. ValueError, naming the setting `key`, if there
    are none.
    """
    for folder in search_folders():
        found = {same_file_key(file): file for file in sorted(_meant(folder, os.path.expanduser(path)), reverse=True)}
        if found:
            return sorted(found.values())
    raise ValueError(f"{key}: no file {path!r}{searched(path)}")


def same_file_key(path: Path) -> tuple[int, int]:
    """Equal for two paths exactly if they are one file, through links as well."""
    status = file_status(path)
    return status.st_dev, status.st_ino


def search_folders() -> list[Path]:
    """Where a relative path is looked up, in this order."""
    shared = os.environ.get("LMTRAIN_DATA")
    return [Path.cwd(), *([Path(shared)] if shared else [])]


def searched(path: str) -> str:
    """Words for where `path` was looked up, for messages."""
    if os.path.isabs(os.path.expanduser(path)):
        return ""
    folders = search_folders()
    unset = "" if len(folders) > 1 else " ($LMTRAIN_DATA is not set)"
    return f" in {' or '.join(map(str, folders))}{unset}"


def _meant(folder: Path, path: str) -> Iterator[Path]:
    target = folder / path
    if os.path.isfile(target):
        yield target
    elif os.path.isdir(target):
        for parent, children, names in os.walk(target, onerror=_refuse):
            children[:] = [child for child in children if not child.startswith(".")]
            files = (Path(parent) / name for name in names if not name.startswith("."))
            yield from filter(os.path.isfile, files)  # not pipes, nor links to nowhere
    else:
        matches = glob.glob(path, root_dir=folder, recursive=True)
        yield from filter(os.path.isfile, (folder / match for match in matches))


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error
