"""What lies in a run's folder of checkpoints and why, and how damaged ones are put out of the way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.disk import sync_folder
from lmtrain.checkpoint.manifest import read_manifest, verify
from lmtrain.checkpoint.shelf import candidates, point_latest, remnants, step_of
from lmtrain.files import token
from lmtrain.table import table


@dataclass(frozen=True)
class Entry:
    """A folder: its step, what it takes on the disk, what is wrong with it ([]: every byte is as written), why it is
    there."""

    name: str
    step: int
    bytes: int
    problems: list[str]
    why: str

    @property
    def row(self) -> dict[str, Any]:
        """As JSON; complete: it has every file that belongs to it."""
        return {
            "name": self.name,
            "step": self.step,
            "bytes": self.bytes,
            "verified": not self.problems,
            "complete": not any(problem.endswith(": missing") for problem in self.problems),
            "problems": self.problems,
            "why": self.why,
        }


def inventory(folder: Path, keep: int) -> list[Entry]:
    """What has a checkpoint's name in `folder`, or is what is left of one, newest first; every byte is read.

    keep: newest ones of those that verify that the run keeps.
    """
    entries, intact = [], 0
    for path in candidates(folder):
        problems = verify(path)
        intact += not problems
        if problems:
            why = f"damaged: goes once {keep} newer ones verify; `repair` moves it aside"
        elif intact == 1:
            why = "the newest that verifies: training goes on from it"
        else:
            why = f"one of the newest {keep}" if intact <= keep else "older: goes at the next save"
        entries.append(_entry(path, problems, why))
    for path, why in remnants(folder):
        entries.append(_entry(path, verify(path), why))
    return entries


def format_inventory(entries: list[Entry]) -> str:
    """A table for people."""
    rows = [[e.name, f"{e.bytes:,}", "; ".join(e.problems) or "intact", e.why] for e in entries]
    return table(["checkpoint", "bytes", "verified", "why it is there"], rows) if rows else "no checkpoint"


@dataclass(frozen=True)
class Repair:
    """What was done: damaged checkpoints that were moved, with what is wrong; intact ones that got their own name; and
    the newest intact one, None if nothing usable is left."""

    moved: list[tuple[Path, Path, list[str]]]
    renamed: list[tuple[Path, Path]]
    newest: Path | None

    def format(self) -> str:
        """What was done, a line each."""
        lines = [f"{old.name}: moved to {new}: {'; '.join(problems)}" for old, new, problems in self.moved]
        lines += [f"{old.name}: is intact, and is {new.name} again" for old, new in self.renamed]
        lines.append(f"training goes on from {self.newest}" if self.newest else "no usable checkpoint is left")
        return "\n".join(lines)


def repair(folder: Path) -> Repair:
    """Moves the damaged checkpoints of `folder` into its folder `damaged`, gives intact ones that bear another name
    their own if it is free, and points `latest` to the newest intact one. Nothing is deleted.

    Only for the holder of the run's lock.
    """
    moved, renamed, intact = [], [], []
    for path in candidates(folder):
        if not (problems := verify(path)):
            intact.append(path)
        else:
            aside = folder / "damaged" / f"{path.name}-{token()}"
            aside.parent.mkdir(exist_ok=True)
            os.rename(path, aside)
            moved.append((path, aside, problems))
    lost = [aside for _, aside, _ in moved] + [path for path, _ in remnants(folder) if ".damaged-" in path.name]
    for path in lost:
        if not verify(path) and not (own := folder / f"step-{read_manifest(path).step}").exists():
            os.rename(path, own)
            renamed.append((path, own))
            intact.append(own)
    if moved:
        sync_folder(folder / "damaged")
    if moved or renamed:
        sync_folder(folder)
    back = {old for old, _ in renamed}
    newest = next((path for path in candidates(folder) if path in intact), None)
    if newest is not None:
        point_latest(newest)
    return Repair([entry for entry in moved if entry[1] not in back], renamed, newest)


def _entry(path: Path, problems: list[str], why: str) -> Entry:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.lstat().st_size for file in files)
    step = step_of(path)
    return Entry(path.name, step, size, problems, why)
