"""A folder of checkpoints: finding the newest intact one, keeping the newest few, clearing what crashes left.

step-250                    a checkpoint; a rename gave it this name when it was complete
step-500.tmp-1a2b3c4d       being written, or left by a crash
step-250.damaged-1a2b3c4d   set aside by a save that reached the same step again
step-250.undone-1a2b3c4d    set aside by a run that rolled back to an earlier one
step-250.trash-1a2b3c4d     being removed, or left by a crash
damaged                     a folder of those that `lmtrain checkpoint repair` moved out of the way
latest                      the name of the newest one: a hint for people, never read
"""

import logging
import os
import re
import shutil
from collections.abc import Collection
from itertools import islice
from pathlib import Path

from data.disk import sync_folder
from lmtrain import fault
from lmtrain.checkpoint.manifest import STEP_FOLDER, verify
from lmtrain.files import replace_bytes, token

logger = logging.getLogger(__name__)
_LEFTOVER = re.compile(r"(?:step-[0-9]+|latest)\.(?:tmp|trash)-[0-9a-f]{8}")
_REMNANT = re.compile(r"step-[0-9]+\.(?:tmp|trash|damaged|undone)-[0-9a-f]{8}")
_ASIDE = re.compile(r"(step-[0-9]+)\.(damaged|undone)-[0-9a-f]{8}")


def candidates(folder: Path, last: int | None = None) -> list[Path]:
    """What has a checkpoint's name in `folder`, newest step first, up to step `last`; nothing is verified."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    found = [path for path in found if last is None or step_of(path) <= last]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path, last: int | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint of which every byte verifies, and each newer one with its files and reasons.

    last: no checkpoint of a later step is looked at.
    """
    folder = Path(folder)
    found = candidates(folder, last)
    rejected: list[tuple[Path, str]] = []
    for path in found:
        problems = verify(path)
        if not problems:
            return path, rejected
        rejected.append((path, "; ".join(problems)))
    # a run at work may have saved one and removed another while we read
    return newest(folder, last) if candidates(folder, last) != found else (None, rejected)


class Verified:
    """Checkpoints that this process has read and found whole: each is read once, not with every save after it.

    One of which a file has changed since, by size or time, is read again. A bit that flips on the disk by itself
    shows when it is resumed from; the newest has always just been read.
    """

    def __init__(self) -> None:
        self._stamps: dict[Path, list[tuple[str, int, int]]] = {}

    def add(self, path: Path) -> None:
        """The checkpoint at `path` was just found whole."""
        self._stamps[path] = _stamp(path)

    def discard(self, path: Path) -> None:
        """It is there no more."""
        self._stamps.pop(path, None)

    def __contains__(self, path: Path) -> bool:
        stamp = _stamp(path)
        if self._stamps.get(path) == stamp:
            return True
        if verify(path):
            return False
        self._stamps[path] = stamp
        return True


def retain(folder: Path, keep: int, protected: Collection[Path] = (), verified: Verified | None = None) -> list[Path]:
    """Removes what is older than the `keep` newest that verify, except the `protected`; returns the removed.

    A damaged one is not counted, and stays until `keep` newer ones verify. verified: those known to.
    """
    assert keep >= 1, keep
    fault.before("retention")
    folder = Path(folder)
    verified = Verified() if verified is None else verified
    intact = list(islice((path for path in candidates(folder) if path in verified), keep))
    if len(intact) < keep:
        return []
    spared = {path.resolve() for path in protected}
    aside = [path for path in folder.iterdir() if _ASIDE.fullmatch(path.name)]
    removed = [
        path
        for path in (*candidates(folder), *aside)
        if step_of(path) < step_of(intact[-1]) and path.resolve() not in spared
    ]
    for path in removed:
        remove(path)
        verified.discard(path)
    return removed


def undo(last: Path) -> list[Path]:
    """Sets the checkpoints beyond the one at `last` aside, newest first, so that nobody resumes from them; returns
    them."""
    undone = [path for path in candidates(last.parent) if step_of(path) > step_of(last)]
    for path in undone:
        os.rename(path, path.with_name(f"{path.name}.undone-{token()}"))
    sync_folder(last.parent)
    return undone


def remove(path: Path) -> None:
    """Removes a checkpoint; it takes another name first, under which half of one is no candidate."""
    trash = path.with_name(f"step-{step_of(path)}.trash-{token()}")
    os.rename(path, trash)
    sync_folder(path.parent)
    _delete(trash)


def clean(folder: Path) -> list[Path]:
    """Removes what crashed writers left in `folder`, and returns it. Only for the holder of the run's lock.

    A crash between setting an old `step-N` aside and committing the new one leaves neither: the old one, if
    intact, returns.
    """
    folder = Path(folder)
    leftovers = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        aside = _ASIDE.fullmatch(path.name)
        if _LEFTOVER.fullmatch(path.name):
            _delete(path)
            leftovers.append(path)
        elif aside and aside[2] == "damaged" and not (folder / aside[1]).exists() and not verify(path):
            os.rename(path, folder / aside[1])
            sync_folder(folder)
    return leftovers


def remnants(folder: Path) -> list[tuple[Path, str]]:
    """What is no checkpoint any more, or not yet, newest step first, and why it is there."""
    why = {
        "tmp": "not finished: a save is at work, or crashed; then it goes at the next start",
        "trash": "being removed, or left by a crash; then it goes at the next start",
        "damaged": "set aside when its step was saved again",
        "undone": "set aside by a roll-back to an earlier one",
    }
    found = [path for path in folder.iterdir() if _REMNANT.fullmatch(path.name)] if folder.is_dir() else []
    kinds = {path: path.name.partition(".")[2].partition("-")[0] for path in sorted(found, key=step_of, reverse=True)}
    return [(path, why[kind]) for path, kind in kinds.items()]


def point_latest(target: Path) -> None:
    """Writes the name of the checkpoint at `target` into `latest`."""
    try:
        replace_bytes(target.with_name("latest"), f"{target.name}\n".encode())
    except OSError as error:  # only a hint: the checkpoint is there without it
        logger.warning("%s does not point to %s: %s", target.with_name("latest"), target.name, error)


def check_space(folder: Path, checkpoint_bytes: int, keep: int) -> None:
    """ValueError if there is no room for `keep` checkpoints and one more in `folder`, which need not exist.

    One more, because the oldest goes only after the newest is complete. What the checkpoints in `folder` take
    already counts as room: they make way.
    """
    folder = Path(folder)
    disk = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(disk).free
    files = [file for path in candidates(folder) for file in path.glob("*") if file.is_file()]
    taken = sum(file.stat().st_size for file in files)
    needed = (keep + 1) * checkpoint_bytes
    if free + taken < needed:
        raise ValueError(
            f"disk too small for the checkpoints: {keep} are kept and one more is being written, "
            f"{_size(checkpoint_bytes)} each, {_size(needed)} together; {disk} has {_size(free)} free"
            + (f" and {_size(taken)} in checkpoints" if taken else "")
            + ". Lower checkpoint.keep, or choose another run.dir."
        )


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the last change of each file in a folder."""
    found = [(file.name, file.lstat()) for file in path.iterdir()] if path.is_dir() else []
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in found)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-").partition(".")[0])


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10_000_000 else f"{count:,} bytes"
