"""Checkpoints: a folder each, complete or absent, every byte hashed, nothing that a load could execute.

    step-250/model.safetensors        one file for each group of tensors
    step-250/optimizer.safetensors
    step-250/state.json               counters, cursor and whatever else of the run is JSON
    step-250/manifest.json            what belongs to it, see `lmtrain.checkpoint.manifest`

`save` touches no state but the folder, so a thread may run it on copies of the tensors. What happens to a
folder of checkpoints (`newest`, `retain`, `clean`, `check_space`) is in `lmtrain.checkpoint.shelf`.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.disk import sync_folder
from lmtrain import fault
from lmtrain.checkpoint.manifest import STATE, FileEntry, Manifest, checked, read_manifest, verify, write_manifest
from lmtrain.checkpoint.shelf import Verified, check_space, clean, newest, point_latest, retain, undo
from lmtrain.checkpoint.tensorfile import copied as _copied
from lmtrain.checkpoint.tensorfile import file_bytes, read_tensors, write_tensors
from lmtrain.files import HashingWriter, token

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Verified",
    "bytes_needed",
    "check_space",
    "clean",
    "copied",
    "load",
    "newest",
    "retain",
    "save",
    "undo",
    "verify",
]

Groups = Mapping[str, Mapping[str, Tensor]]
_SUFFIX = ".safetensors"
_GROUP = re.compile(r"[a-z0-9_]+")
_MARGIN = 1 << 20  # bytes for state.json, the manifest and the file system's own blocks


class CheckpointError(Exception):
    """A checkpoint could not be written: those before it are untouched, and training can go on.

    `path` is where it should have gone, `bytes_needed` what it takes on the disk.
    """

    def __init__(self, path: Path, bytes_needed: int, reason: str) -> None:
        super().__init__(f"{path} could not be written: {reason}; it needs {bytes_needed:,} bytes")
        self.path = path
        self.bytes_needed = bytes_needed


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: groups of tensors by name, on the CPU, and the state that was JSON."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    manifest: Manifest


def bytes_needed(tensors: Groups) -> int:
    """Bytes that a checkpoint of these groups takes on the disk, with a margin for what is not tensors."""
    return sum(file_bytes(group) for group in tensors.values()) + _MARGIN


def copied(tensors: Groups) -> dict[str, dict[str, Tensor]]:
    """The groups in CPU memory of their own, for a thread to write while training goes on."""
    return {group: _copied(members) for group, members in tensors.items()}


def save(
    folder: Path,
    step: int,
    tensors: Groups,
    state: Mapping[str, Any],
    *,
    config: str | None = None,
    dataset: str | None = None,
    world: int = 1,
) -> Path:
    """Writes `folder/step-N` and returns it; it gets this name when it is on the disk and was read back.

    `state` must be JSON (tuples come back as lists, keys as strings); `config` is the configuration's hash,
    `dataset` the data's fingerprint, `world` the number of processes. A `step-N` already there is set aside.
    CheckpointError if the disk refuses it, or gives back something else; then nothing is left of it.
    """
    folder = Path(folder)
    target = folder / f"step-{step}"
    needed = bytes_needed(tensors)
    temporary = folder / f"{target.name}.tmp-{token()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:  # to fill the disk first would also stop whoever else writes to it
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free:,} bytes are free")
        try:
            temporary.mkdir()
            files = _write_files(temporary, tensors, state)
            write_manifest(temporary, Manifest(step, files, config, dataset, world, _versions()))
            sync_folder(temporary)
            if problems := verify(temporary):
                raise OSError(errno.EIO, f"read back, it differs: {'; '.join(problems)}")
            _commit(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(target, needed, error.strerror or str(error)) from error
    fault.before("latest")
    point_latest(target)
    return target


def load(path: Path, groups: Collection[str] | None = None) -> Checkpoint:
    """Reads the checkpoint at `path`, all of its groups or only the named ones, each byte verified.

    ValueError, naming path and file, if anything is missing or not as it was written.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        with checked(path, STATE, manifest.files[STATE]) as reader:
            state = json.loads(reader.read(reader.size))
        tensors = {}
        for name, entry in manifest.files.items():
            group = name.removesuffix(_SUFFIX)
            if group != name and (groups is None or group in groups):
                with checked(path, name, entry) as reader:
                    tensors[group] = read_tensors(reader)
        if missing := set(groups or ()) - set(tensors):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
    return Checkpoint(path, manifest.step, tensors, state, manifest)


def _write_files(folder: Path, tensors: Groups, state: Mapping[str, Any]) -> dict[str, FileEntry]:
    files = {}
    for group, members in tensors.items():
        assert _GROUP.fullmatch(group), group
        with HashingWriter(folder / f"{group}{_SUFFIX}") as writer:
            write_tensors(writer, members)
        files[f"{group}{_SUFFIX}"] = FileEntry(writer.bytes, writer.sha256())
    with HashingWriter(folder / STATE) as writer:
        writer.write((json.dumps(state, indent=1) + "\n").encode())
    files[STATE] = FileEntry(writer.bytes, writer.sha256())
    return files


def _commit(temporary: Path, target: Path) -> None:
    """Gives a complete checkpoint its name. A folder that bears it, and cannot be replaced, steps aside."""
    if os.path.lexists(target):
        os.rename(target, target.with_name(f"{target.name}.damaged-{token()}"))
    fault.before("commit")
    os.rename(temporary, target)
    sync_folder(target.parent)


def _versions() -> dict[str, str]:
    try:
        own = version("lmtrain")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    return {"lmtrain": own, "torch": torch.__version__}
