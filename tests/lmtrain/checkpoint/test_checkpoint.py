"""What is saved comes back; what cannot be saved leaves nothing behind."""

import errno
import json
import os
import resource

import pytest
import torch

from lmtrain import checkpoint
from lmtrain.checkpoint import CheckpointError, bytes_needed, load, newest, save, verify

STATE = {
    "samples": 12345678901234567890,
    "window": [0.1 + 0.2, 1e-300, -0.0],
    "nested": {"a": None, "b": True},
}


def groups(seed=0, size=1000):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=generator)
    return {
        "model": {
            "weight": weight,
            "head": weight,
            "centroids": torch.randn(4, generator=generator).bfloat16(),
        },
        "optimizer": {"exp_avg.weight": torch.randn(size, generator=generator), "step": torch.tensor(7)},
    }


def assert_equal(loaded, saved):
    assert {group: set(members) for group, members in loaded.items()} == {g: set(m) for g, m in saved.items()}
    for group, members in saved.items():
        for name, tensor in members.items():
            assert torch.equal(loaded[group][name], tensor)
            assert loaded[group][name].dtype == tensor.dtype


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path / "new" / "checkpoints", 250, groups(), STATE, config="abc", dataset="def", world=2)
    assert path == tmp_path / "new" / "checkpoints" / "step-250"
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert names(path.parent) == ["latest", "step-250"]
    assert (path.parent / "latest").read_text() == "step-250\n"
    assert verify(path) == []
    loaded = load(path)
    assert_equal(loaded.tensors, groups())
    assert (loaded.step, loaded.state, loaded.path) == (250, STATE, path)
    manifest = loaded.manifest
    assert (manifest.config, manifest.dataset, manifest.world) == ("abc", "def", 2)
    assert manifest.versions["torch"] == torch.__version__


def test_the_same_content_gives_the_same_bytes(tmp_path):
    first, second = (save(tmp_path / name, 5, groups(), STATE) for name in ("a", "b"))
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.fault(13)
def test_a_name_with_blanks_and_a_link_to_another_disk(tmp_path):
    (tmp_path / "a disk").mkdir()
    (tmp_path / "link to it").symlink_to(tmp_path / "a disk")
    save(tmp_path / "link to it", 1, groups(), STATE)
    path, rejected = newest(tmp_path / "link to it")
    assert rejected == []
    assert_equal(load(path).tensors, groups())
    assert names(tmp_path / "a disk") == ["latest", "step-1"]


def test_only_the_groups_asked_for_are_read(tmp_path):
    path = save(tmp_path, 1, groups(), STATE)
    (path / "optimizer.safetensors").write_bytes(b"damaged")
    assert_equal(load(path, ["model"]).tensors, {"model": groups()["model"]})
    with pytest.raises(ValueError, match=r"step-1: optimizer.safetensors: 7 bytes, the manifest says \d+"):
        load(path)
    with pytest.raises(ValueError, match="it has no ema"):
        load(path, ["model", "ema"])


def test_a_step_that_was_saved_before_is_set_aside(tmp_path):
    save(tmp_path, 5, groups(0), STATE)
    save(tmp_path, 5, groups(1), STATE)
    assert_equal(load(tmp_path / "step-5").tensors, groups(1))
    (aside,) = tmp_path.glob("step-5.damaged-*")
    assert_equal(load(aside).tensors, groups(0))
    assert newest(tmp_path) == (tmp_path / "step-5", [])


def test_bytes_needed_covers_what_is_written(tmp_path):
    path = save(tmp_path, 5, groups(), STATE)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert written <= bytes_needed(groups()) <= written + (1 << 20)


def test_a_state_that_is_no_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 5, groups(), {"rng": torch.zeros(3)})
    assert names(tmp_path) == []


def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lmtrain.fault.before_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5, groups(), STATE)
    assert names(tmp_path) == []


@pytest.fixture
def one_saved(tmp_path):
    """A folder that holds step-1; afterwards it must hold just that, intact."""
    save(tmp_path, 1, groups(0), STATE)
    yield tmp_path
    assert names(tmp_path) == ["latest", "step-1"]
    assert newest(tmp_path) == (tmp_path / "step-1", [])


@pytest.mark.fault(12)
@pytest.mark.parametrize("limit", [0, 100, 3000, 5000])
def test_a_limit_on_the_size_of_files(one_saved, limit):
    """RLIMIT_FSIZE gives EFBIG; it cannot be raised again, hence the child. 5000 is in the second group."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(one_saved, 2, {"a": {"a": torch.zeros(1000)}, "b": {"b": torch.zeros(2000)}}, STATE)
        except CheckpointError as error:
            os.write(into, f"{error.bytes_needed} {error.path} {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    needed, path, message = os.read(out, 10_000).decode().split(" ", 2)
    assert 12_000 < int(needed) < 12_000 + (2 << 20)
    assert path == str(one_saved / "step-2")
    assert os.strerror(errno.EFBIG) in message
    assert f"{int(needed):,} bytes" in message


@pytest.mark.fault(12)
@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_disk_that_fills_up(one_saved, monkeypatch, victim):
    """The kernel's own ENOSPC: one file of the checkpoint is /dev/full."""
    really_open = os.open

    def open_full(path, flags, *rest, **more):
        is_victim = os.fspath(path).endswith(victim) and flags & os.O_CREAT
        return really_open("/dev/full", os.O_WRONLY) if is_victim else really_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", open_full)
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        save(one_saved, 2, groups(1), STATE)


@pytest.mark.fault(12)
@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
def test_a_disk_that_refuses_late(one_saved, monkeypatch, call, code):
    """Quotas and failing disks often speak up only when the file is synced."""

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CheckpointError, match=os.strerror(code)):
        save(one_saved, 2, groups(1), STATE)
    monkeypatch.undo()


@pytest.mark.fault(12)
def test_too_little_space_is_seen_before_anything_is_written(one_saved, monkeypatch):
    needed = bytes_needed(groups())
    usage = checkpoint.shutil.disk_usage(one_saved)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    monkeypatch.setattr("lmtrain.fault.before_write", lambda *_: pytest.fail("written"))
    with pytest.raises(CheckpointError, match=f"{needed - 1:,} bytes are free; it needs {needed:,} bytes"):
        save(one_saved, 2, groups(1), STATE)


@pytest.mark.fault(12)
def test_a_disk_that_gives_back_something_else(one_saved, monkeypatch):
    really_write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: really_write(file, bytes(data).replace(b"F32", b"I32")))
    with pytest.raises(CheckpointError, match=r"read back, it differs: model.safetensors: its sha256 .*; optimizer"):
        save(one_saved, 2, groups(1), STATE)
    monkeypatch.undo()


def test_a_hint_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "latest").mkdir()
    assert save(tmp_path, 2, groups(), STATE) == tmp_path / "step-2"
    assert "latest does not point to step-2" in caplog.text
    assert newest(tmp_path) == (tmp_path / "step-2", [])


@pytest.mark.fault(13)
def test_a_folder_that_cannot_be_made(tmp_path):
    """Root may write anywhere, so a file stands in the way instead of missing permissions."""
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="step-1 could not be written"):
        save(tmp_path / "checkpoints", 1, groups(), STATE)
    assert (tmp_path / "checkpoints").read_text() == "a file"


def test_the_manifest_is_plain_json_that_others_can_check(tmp_path):
    import hashlib

    path = save(tmp_path, 3, groups(), STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["step"] == 3
    for name, file in manifest["files"].items():
        content = (path / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
