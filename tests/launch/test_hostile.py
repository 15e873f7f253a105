"""A run from somebody else, and words that nobody meant: each command says what is wrong, runs and writes nothing."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from lmtrain.checkpoint.manifest import FileEntry, read_manifest, write_manifest
from lmtrain.files import HashingReader
from tests.lmtrain import tiny

KEPT = "eval/kept.json"
FILES = [
    "config.yaml", "status.json", "environment.json", "metrics.jsonl", "events.jsonl", "log.txt", "lock", KEPT,
    "checkpoints/latest", *(f"checkpoints/step-4/{name}" for name in ("model.safetensors", "optimizer.safetensors")),
    "checkpoints/step-4/state.json", "checkpoints/step-4/manifest.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run that was evaluated."""
    folder = tmp_path_factory.mktemp("original")
    settings = tiny.settings(folder, "train.steps=4", "eval.every=0")
    assert main(["train", str(tiny.write(folder)), *settings]) == 0
    assert main(["eval", str(folder / "run"), "--by-document"]) == 0
    (kept,) = (folder / "run/eval").glob("*.json")
    kept.rename(folder / "run" / KEPT)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Its copy, to be spoilt."""
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


class Harm:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


CONTENTS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda trace: pickle.dumps(Harm(trace)),
    "pickle in text": lambda trace: pickle.dumps(Harm(trace), protocol=0),
    "tag": lambda trace: f"!!python/object/apply:os.mkdir ['{trace}']\n".encode(),
    "nothing": lambda trace: b"",
    "zeros": lambda trace: bytes(1000),
    "list": lambda trace: b"[]\n",
    "object": lambda trace: b"{}\n",
    "deep": lambda trace: b"[" * 100_000,
    "endless": lambda trace: b'{"step": 1e999, "pid": 1e999, "host": "x", "started": "x"}\n',
}


def sign(checkpoint: Path) -> None:
    """Makes the manifest fit the files, as whoever forges a checkpoint would."""
    manifest = read_manifest(checkpoint)
    for name in manifest.files:
        with HashingReader(checkpoint / name) as reader:
            reader.skim()
            manifest.files[name] = FileEntry(reader.size, reader.sha256())  # type: ignore[index]
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, manifest)


def code(*words: str) -> int:
    try:
        return main(list(words))
    except SystemExit as stopped:  # a command line that makes no sense
        return int(str(stopped.code))


def test_no_file_of_a_run_is_forgotten(original: Path) -> None:
    run = original / "run"
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert found == set(FILES)


@pytest.mark.fault(16)
@pytest.mark.parametrize("name", FILES)
def test_whatever_is_in_a_file_no_command_runs_it_or_ends_without_words(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """With right sizes and hashes, too. The commands that read a run, each in its turn."""
    run, trace = folder / "run", tmp_path / "executed"
    intact = (run / name).read_bytes()
    for kind, content in CONTENTS.items():
        (run / name).write_bytes(content(trace))
        if name.startswith("checkpoints/step-4/") and not name.endswith("manifest.json"):
            sign(run / "checkpoints/step-4")
        codes = {
            "verify": code("checkpoint", "verify", str(run)),
            "generate": code("generate", str(run), "--length", "1"),
            "inspect": code("inspect", str(run)),
            "compare": code("compare", str(run / KEPT), str(run / KEPT)) if name == KEPT else 2,
            "train": code("train", str(folder / "tiny.yaml"), *tiny.settings(folder, "train.steps=4", "eval.every=0")),
        }
        assert not trace.exists(), kind
        assert set(codes.values()) <= {0, 2, 4}, (kind, codes)
        if name.startswith("checkpoints/step-4/"):
            assert codes["generate"] == codes["train"] == 2 or name.endswith("optimizer.safetensors"), (kind, codes)
        (run / name).write_bytes(intact)
