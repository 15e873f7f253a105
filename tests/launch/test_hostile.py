"""A run from somebody else, and words that nobody meant: each command says what is wrong, runs and writes nothing."""

import atexit
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from launch.cli import main
from lmtrain.checkpoint.manifest import FileEntry, read_manifest, write_manifest
from lmtrain.files import HashingReader
from tests.lmtrain import tiny
from tests.mutations import fuzz

KEPT = "eval/kept.json"
FILES = [
    "config.yaml", "status.json", "environment.json", "metrics.jsonl", "events.jsonl", "log.txt", "lock", KEPT,
    "checkpoints/latest", *(f"checkpoints/step-4/{name}" for name in ("model.safetensors", "optimizer.safetensors")),
    "checkpoints/step-4/state.json", "checkpoints/step-4/manifest.json",
]  # fmt: skip


@cache
def shared_run() -> Path:
    """A folder with a finished run that was evaluated, for tests that change nothing in it."""
    folder = Path(tempfile.mkdtemp(prefix="lmtrain-test-"))
    atexit.register(shutil.rmtree, folder)
    settings = tiny.settings(folder, "train.steps=4", "eval.every=0")
    assert main(["train", str(tiny.write(folder)), *settings]) == 0
    assert main(["eval", str(folder / "run"), "--by-document"]) == 0
    (kept,) = (folder / "run/eval").glob("*.json")
    kept.rename(folder / "run" / KEPT)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Its copy, to be spoilt."""
    shutil.copytree(shared_run(), tmp_path / "copy")
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


def test_no_file_of_a_run_is_forgotten() -> None:
    run = shared_run() / "run"
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
            "inspect": code("inspect", str(run)) if name == "config.yaml" else 2,
            "compare": code("compare", str(run / KEPT), str(run / KEPT)) if name == KEPT else 2,
            "train": code("train", str(folder / "tiny.yaml"), *tiny.settings(folder, "train.steps=4", "eval.every=0")),
        }
        assert not trace.exists(), kind
        assert set(codes.values()) <= {0, 2, 4}, (kind, codes)
        if name.startswith("checkpoints/step-4/"):
            assert codes["generate"] == codes["train"] == 2 or name.endswith("optimizer.safetensors"), (kind, codes)
        (run / name).write_bytes(intact)


VERBS = ["inspect", "list", "checkpoint", "compare", "launch", "fly", ""]  # those that are done at once
OPTIONS = ["--length", "--json", "--context", "--stride", "--on", "--carry", "--memory", "--world", "--sequence"]
OPTIONS += ["--zero", "--out", "--option", "--time", "--nodes", "--processes", "--", "-", "--debug", "--safetensors"]
WORDS = ["RUN", "KEPT", "CONFIG", "demo", "verify", "export", "slurm", "0", "-1", "3", "1e9", "nan", "10" * 200, "="]
WORDS += ["a=1", "model.dim=x", "model.dim=1e9", "text:all", "/dev/null", "/", ".", "no/where", "é", "\udcff"]
WORDS += ["\x1b[2J", "x" * 5000]
command = st.tuples(st.sampled_from(VERBS), st.lists(st.sampled_from(OPTIONS + 2 * WORDS), max_size=6))


@pytest.fixture(autouse=True)
def spot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    (tmp_path / "spot").mkdir()
    monkeypatch.chdir(tmp_path / "spot")
    return tmp_path / "spot"


@pytest.mark.fault(15)
@fuzz(command, 150, 5000)
def test_any_words(drawn: tuple[str, list[str]], folder: Path) -> None:
    """Each command ends with 0, 2 or 4, and writes nothing but what it was told to."""
    run, spot = shared_run(), folder / "spot"
    named = {"RUN": f"{run}/run", "KEPT": f"{run}/run/{KEPT}", "CONFIG": f"{run}/tiny.yaml"}
    verb, words = drawn
    before = {path for path in run.rglob("*") if "export" not in path.parts}
    assert code(*filter(None, [verb]), *(named.get(word, word) for word in words)) in (0, 2, 4)
    after = {path for path in run.rglob("*") if "export" not in path.parts}
    assert before <= after
    for path in after - before:
        assert verb == "compare", "no other scores a run, and keeps the result"
        assert path.parent == run / "run/eval"
        path.unlink()
    for path in spot.iterdir():
        assert verb in ("launch", "checkpoint"), "no other writes a file"
        path.unlink() if path.is_file() else shutil.rmtree(path)


UNFIT = {
    "generate --length 1": [
        ["--seed", "10" * 20], ["--seed", "-1"], ["--seed", "9" * 5000], ["--temperature", "nan"],
        ["--temperature", "-1"], ["--temperature", "inf"], ["--temperature", "1e-320"], ["--temperature", "1e300"],
        ["--top-p", "nan"], ["--top-p", "-1"], ["--top-p", "7"], ["--top-k", "0"], ["--top-k", "10" * 40],
        ["--prompt", "\udcff"], ["--length", "0"],
    ],
    "eval": [
        ["--context", "10" * 40], ["--stride", "9999"], ["--on", "text:\udcff"], ["--on", ":"], ["--on", "passkey"],
        ["--path", "x" * 5000], ["--prefixes", "3"], ["--plot", "/no/where.svg"],
    ],
}  # fmt: skip


@pytest.mark.fault(15)
@pytest.mark.parametrize("verb", UNFIT)
def test_settings_that_hardly_make_sense(folder: Path, verb: str) -> None:
    for words in UNFIT[verb]:
        assert code(*verb.split(), f"{folder}/run", *words) in (0, 2), words
