"""A checkpoint that changed after it was written is named aloud, never used, and never executed."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from lmtrain.checkpoint import load, newest, save, verify

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        groups = {"model": {"weight": torch.full((9,), float(step))}, "optimizer": {"m": torch.ones(5)}}
        save(folder, step, groups, {"step": step})
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "checkpoints"))


def assert_named_and_passed_over(folder, file):
    """step-2 is rejected because of `file`, step-1 is used, and step-2 cannot be loaded by name."""
    path, rejected = newest(folder)
    assert path == folder / "step-1"
    ((bad, reason),) = rejected
    assert bad == folder / "step-2"
    assert reason.startswith(f"{file}: ")
    with pytest.raises(ValueError, match=f"checkpoint {folder}/step-2: {file}: "):
        load(folder / "step-2")


@pytest.mark.fault(3)
@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit(folder, file):
    path = folder / "step-2" / file
    content = path.read_bytes()
    with open(path, "r+b", buffering=0) as victim:
        for position, byte in enumerate(content):
            victim.seek(position)
            victim.write(bytes([byte ^ 1 << position % 8]))
            problems = verify(path.parent)
            assert len(problems) == 1, position
            assert problems[0].startswith(f"{file}: ")
            victim.seek(position)
            victim.write(bytes([byte]))
    assert verify(path.parent) == []
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    assert_named_and_passed_over(folder, file)


class Harmful:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (
        path.rename(path.with_suffix(".real")),
        path.symlink_to(path.with_suffix(".real")),
    ),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Harmful(path.parent.parent / "witness"))),
    "torch.save": lambda path: torch.save(Harmful(path.parent.parent / "witness"), path),
}


@pytest.mark.fault(4)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_each_kind_to_each_file(folder, file, damage):
    DAMAGE[damage](folder / "step-2" / file)
    assert_named_and_passed_over(folder, file)
    assert not (folder / "witness").exists()


def test_the_harm_is_real(tmp_path):
    """Otherwise the test above could not fail."""
    pickle.loads(pickle.dumps(Harmful(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


@pytest.mark.fault(4)
@pytest.mark.parametrize("content", ["", "step-9\n", "../../etc", "\0\0", "step-1\n", None])
def test_latest_is_a_hint_only(folder, content):
    if content is None:
        (folder / "latest").unlink()
        (folder / "latest").symlink_to(folder / "nowhere")
    else:
        (folder / "latest").write_text(content)
    assert newest(folder) == (folder / "step-2", [])


@pytest.mark.fault(4)
def test_what_is_no_checkpoint_is_passed_over(folder):
    for name in (
        "step-3.tmp-0a1b2c3d",
        "step-4.trash-0a1b2c3d",
        "step-5.damaged-0a1b2c3d",
        "step-6x",
        "step--7",
        "best",
    ):
        shutil.copytree(folder / "step-2", folder / name)
    (folder / "step-08").mkdir()
    assert newest(folder) == (folder / "step-2", [])


@pytest.mark.fault(3, 4)
def test_rejected_are_named_newest_first(folder):
    (folder / "step-10").mkdir()
    (folder / "step-9").write_text("a file")
    shutil.copytree(folder / "step-2", folder / "step-8")
    path, rejected = newest(folder)
    assert path == folder / "step-2"
    assert rejected == [
        (folder / "step-10", "manifest.json: missing"),
        (folder / "step-9", "there is no such folder"),
        (folder / "step-8", "manifest.json: it is of step 2, in a folder named step-8"),
    ]


@pytest.mark.fault(4)
def test_all_damaged_or_none_there(folder, tmp_path):
    for step in (1, 2):
        (folder / f"step-{step}" / "state.json").write_text("{}")
    path, rejected = newest(folder)
    assert path is None
    assert [bad.name for bad, _ in rejected] == ["step-2", "step-1"]
    assert newest(tmp_path / "nowhere") == (None, [])
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        load(tmp_path / "nowhere")


def test_every_problem_is_listed(folder):
    (folder / "step-2" / "state.json").unlink()
    (folder / "step-2" / "model.safetensors").write_bytes(b"")
    assert [problem.partition(":")[0] for problem in verify(folder / "step-2")] == [
        "model.safetensors",
        "state.json",
    ]


def forge(path, change):
    """Rewrites the manifest at `path` with a right checksum, as whoever wants to deceive us would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest.pop("checksum", None)
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def test_a_forged_manifest_without_changes_is_accepted(folder):
    """Otherwise the tests below could not fail."""
    forge(folder / "step-2", lambda manifest: None)
    assert verify(folder / "step-2") == []


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/b", "..", ".", "", ".hidden", "a\\b", "a\0b", "x\n"]
)
def test_a_name_that_is_not_plain_is_refused(folder, name):
    outside = folder / "x.safetensors"
    shutil.copy(folder / "step-2" / "model.safetensors", outside)
    forge(
        folder / "step-2",
        lambda manifest: manifest["files"].update({name: manifest["files"]["model.safetensors"]}),
    )
    (problem,) = verify(folder / "step-2")
    assert problem == f"manifest.json: {name!r} is not a plain file name"
    with pytest.raises(ValueError, match="is not a plain file name"):
        load(folder / "step-2")


CHANGES = {
    "format 2": lambda manifest: manifest.update(format=2),
    "no format": lambda manifest: manifest.pop("format"),
    "no step": lambda manifest: manifest.pop("step"),
    "endless step": lambda manifest: manifest.update(step=float("inf")),
    "no files": lambda manifest: manifest.pop("files"),
    "a list of files": lambda manifest: manifest.update(files=["model.safetensors"]),
    "a file without size": lambda manifest: manifest["files"]["model.safetensors"].pop("bytes"),
    "no state": lambda manifest: manifest["files"].pop("state.json"),
    "no versions": lambda manifest: manifest.pop("versions"),
}


@pytest.mark.fault(4)
@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_is_none_is_refused(folder, change):
    forge(folder / "step-2", CHANGES[change])
    assert_named_and_passed_over(folder, "manifest.json")


@pytest.mark.fault(4)
@pytest.mark.parametrize("content", ["[]", "null", "1", '"checksum"', "[" * 100_000, "{}", "NaN"])
def test_json_that_is_no_manifest_is_refused(folder, content):
    (folder / "step-2" / "manifest.json").write_text(content)
    assert_named_and_passed_over(folder, "manifest.json")


def test_an_enormous_manifest_is_not_read(folder):
    os.truncate(folder / "step-2" / "manifest.json", 1 << 40)  # sparse: it takes no disk, but would take memory
    assert_named_and_passed_over(folder, "manifest.json")


@pytest.mark.fault(16)
def test_a_pickle_with_a_right_hash_still_executes_nothing(folder):
    path = folder / "step-2" / "model.safetensors"
    path.write_bytes(pickle.dumps(Harmful(folder / "witness")))
    entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    forge(path.parent, lambda manifest: manifest["files"].update({path.name: entry}))
    assert verify(path.parent) == []
    with pytest.raises(ValueError, match=r"step-2: model.safetensors: a header of \d+ bytes in a file of \d+"):
        load(path.parent)
    assert not (folder / "witness").exists()
