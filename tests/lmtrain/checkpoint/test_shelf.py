"""Which checkpoints of a folder stay, which go, and whether there is room for them."""

import os
import shutil

import pytest
import torch

from lmtrain.checkpoint import Verified, check_space, clean, newest, retain, save, shelf, verify


def save_steps(folder, *steps):
    for step in steps:
        save(folder, step, {"model": {"weight": torch.zeros(10)}}, {})


def names(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def test_the_newest_stay(tmp_path):
    save_steps(tmp_path, 2, 9, 10, 100)
    assert retain(tmp_path, 2) == [tmp_path / "step-9", tmp_path / "step-2"]
    assert names(tmp_path) == ["step-10", "step-100"]
    assert retain(tmp_path, 2) == retain(tmp_path, 3) == []


def test_the_protected_stay(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert retain(tmp_path, 1, protected=[tmp_path / "step-2", tmp_path / "link" / "step-3"]) == [tmp_path / "step-1"]
    assert names(tmp_path) == ["step-2", "step-3", "step-4"]


@pytest.mark.fault(4)
def test_only_those_that_verify_count(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5)
    for step in (5, 3):
        (tmp_path / f"step-{step}" / "state.json").unlink()
    assert retain(tmp_path, 2) == [tmp_path / "step-1"]
    assert names(tmp_path) == ["step-2", "step-3", "step-4", "step-5"]
    save_steps(tmp_path, 6)
    assert retain(tmp_path, 2) == [tmp_path / "step-3", tmp_path / "step-2"]


def test_what_was_read_once_is_not_read_again_unless_it_changed(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(shelf, "verify", lambda path: read.append(path.name) or verify(path))
    verified = Verified()
    for step in (1, 2, 3, 4, 5):
        save_steps(tmp_path, step)
        verified.add(tmp_path / f"step-{step}")
        retain(tmp_path, 3, verified=verified)
    assert names(tmp_path) == ["step-3", "step-4", "step-5"]
    assert read == []
    retain(tmp_path, 3, verified=Verified())
    assert read == ["step-5", "step-4", "step-3"], "of another process"
    read.clear()
    weights = tmp_path / "step-4/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    save_steps(tmp_path, 6)
    assert retain(tmp_path, 3, verified=verified) == []
    assert read == ["step-6", "step-4"], "it changed, and does not count"
    assert names(tmp_path) == ["step-3", "step-4", "step-5", "step-6"]


@pytest.mark.parametrize("how", ["cut", "missing", "replaced", "gone"])
def test_whatever_happens_to_a_checkpoint_it_is_read_again(tmp_path, how):
    save_steps(tmp_path, 1, 2)
    verified, path = Verified(), tmp_path / "step-1"
    verified.add(path)
    assert path in verified
    if how == "cut":
        os.truncate(path / "state.json", 1)
    elif how == "missing":
        (path / "manifest.json").unlink()
    elif how == "replaced":
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "step-2", path)
    else:
        shutil.rmtree(path)
    assert path not in verified
    assert path not in verified


def test_nothing_goes_while_too_few_verify(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    for step in (1, 2, 3):
        (tmp_path / f"step-{step}" / "manifest.json").write_text("")
    assert retain(tmp_path, 1) == []
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]


def test_those_set_aside_go_with_their_age(tmp_path):
    save_steps(tmp_path, 1, 1, 2, 2)
    assert len(names(tmp_path)) == 4
    retain(tmp_path, 1)
    assert [name.partition(".damaged-")[0] for name in names(tmp_path)] == ["step-2", "step-2"]


@pytest.mark.fault(4)
def test_cleaning_takes_only_what_crashes_leave(tmp_path):
    save_steps(tmp_path, 1)
    kept = [
        "step-1",
        "step-2.damaged-0a1b2c3d",
        "step-3.tmp-mine",
        "step-x.tmp-0a1b2c3d",
        "best",
        "my.tmp-0a1b2c3d",
    ]
    gone = ["latest.tmp-0a1b2c3d", "step-2.tmp-0a1b2c3d", "step-30.trash-0a1b2c3d"]
    for name in (*kept[1:], *gone):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    shutil.rmtree(tmp_path / gone[0])
    (tmp_path / gone[0]).write_text("step-1")
    assert [path.name for path in clean(tmp_path)] == gone
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "latest"])
    assert clean(tmp_path / "nowhere") == []


def test_cleaning_follows_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-2.tmp-0a1b2c3d").symlink_to(tmp_path / "elsewhere")
    clean(tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert (tmp_path / "elsewhere" / "file").read_text() == "precious"


@pytest.mark.fault(12)
def test_room_for_those_kept_and_one_more(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    size = sum(file.stat().st_size for file in (tmp_path / "step-1").iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * 1000 - size))
    check_space(tmp_path, 1000, keep=3)  # what the present one takes counts as room
    with pytest.raises(ValueError, match=r"disk too small for the checkpoints: .* 1,001 bytes each, 4,004 bytes"):
        check_space(tmp_path, 1001, keep=3)
    with pytest.raises(ValueError, match="disk too small"):
        check_space(tmp_path / "not" / "there" / "yet", 1000, keep=3)


def test_room_on_the_real_disk(tmp_path):
    check_space(tmp_path / "not yet there", 1000, keep=3)
    with pytest.raises(ValueError, match="GB each"):
        check_space(tmp_path, 10**18, keep=1)
    assert newest(tmp_path) == (None, [])
