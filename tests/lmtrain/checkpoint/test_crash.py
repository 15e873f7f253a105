"""SIGKILL at any moment of a save: a complete checkpoint is found, and the leftovers go.

Each victim is a fork of the test process: it imports nothing, and dies without running anything.
"""

import os
import signal
import time

import pytest
import torch

from lmtrain.checkpoint import clean, load, newest, retain, save, verify

pytestmark = pytest.mark.fault(1)


def groups(step):
    return {"model": {"weight": torch.full((300,), float(step))}, "optimizer": {"exp_avg": torch.ones(100)}}


def save_step(folder, step):
    return save(folder, step, groups(step), {"step": step})


def die(action, fault=""):
    """Runs `action` in a fork with LMTRAIN_FAULT set, and sees it die by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            os.environ["LMTRAIN_FAULT"] = fault
            action()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def steps_found(folder):
    path, rejected = newest(folder)
    assert rejected == []
    loaded = load(path)
    assert torch.equal(loaded.tensors["model"]["weight"], groups(loaded.step)["model"]["weight"])
    return loaded.step


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_at_byte_offsets(tmp_path):
    save_step(tmp_path, 1)
    total = sum(file.stat().st_size for file in (tmp_path / "step-1").iterdir())
    for offset in [*range(0, total, total // 25), total - 1, total]:
        die(lambda: save_step(tmp_path, 2), f"save:bytes={offset}")
        (leftover,) = tmp_path.glob("step-2.tmp-*")
        assert sum(file.stat().st_size for file in leftover.iterdir()) == offset
        assert steps_found(tmp_path) == 1
        assert clean(tmp_path) == [leftover]
        assert names(tmp_path) == ["latest", "step-1"]


@pytest.mark.parametrize(("point", "step", "latest"), [("commit", 1, 1), ("latest", 2, 1), ("retention", 2, 2)])
def test_at_named_points(tmp_path, point, step, latest):
    save_step(tmp_path, 1)

    def save_and_retain():
        save_step(tmp_path, 2)
        retain(tmp_path, 1)

    die(save_and_retain, f"save:before={point}")
    assert steps_found(tmp_path) == step
    assert (tmp_path / "latest").read_text() == f"step-{latest}\n"
    clean(tmp_path)
    assert names(tmp_path) == ["latest", "step-1"] + ["step-2"] * (step == 2)


@pytest.mark.parametrize("removed", range(4))
def test_inside_retention(tmp_path, removed):
    """Dies when some of the files of the old checkpoint are gone: what is left of it is no candidate."""
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)

    def retain_in_part():
        really_unlink, count = os.unlink, iter(range(100))

        def unlink(*arguments, **more):
            if next(count) == removed:
                os.kill(os.getpid(), signal.SIGKILL)
            really_unlink(*arguments, **more)

        os.unlink = unlink
        retain(tmp_path, 1)

    die(retain_in_part)
    (trash,) = tmp_path.glob("step-1.trash-*")
    assert len(names(trash)) == 4 - removed
    assert steps_found(tmp_path) == 2
    assert clean(tmp_path) == [trash]
    assert names(tmp_path) == ["latest", "step-2"]


def test_between_setting_the_old_aside_and_committing_the_new(tmp_path):
    """The only checkpoint bears the step that is saved again: the next start gives it its name back."""
    save_step(tmp_path, 5)
    die(lambda: save_step(tmp_path, 5), "save:before=commit")
    clean(tmp_path)
    assert steps_found(tmp_path) == 5
    assert names(tmp_path) == ["latest", "step-5"]


def test_a_damaged_one_set_aside_stays_there(tmp_path):
    save_step(tmp_path, 4)
    (save_step(tmp_path, 5) / "state.json").write_text("{}")
    die(lambda: save_step(tmp_path, 5), "save:before=commit")
    assert steps_found(tmp_path) == 4
    clean(tmp_path)
    assert steps_found(tmp_path) == 4
    assert len(list(tmp_path.glob("step-5.damaged-*"))) == 1


def test_a_reader_finds_one_at_every_moment(tmp_path):
    """A run saves as fast as it can and keeps only one, while a reader polls."""
    save_step(tmp_path, 0)
    child = os.fork()
    if child == 0:
        for step in range(1, 40):
            save_step(tmp_path, step)
            retain(tmp_path, 1)
        os._exit(0)
    seen = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        path, _ = newest(tmp_path)
        seen.add(path)
    assert None not in seen
    assert steps_found(tmp_path) == 39


def test_killed_at_random_moments(tmp_path):
    """SIGKILL from outside, wherever it strikes; each victim goes on where the one before was killed."""
    save_step(tmp_path, 0)
    for delay in range(15):
        child = os.fork()
        if child == 0:
            for step in range(steps_found(tmp_path) + 1, 1_000_000):
                save_step(tmp_path, step)
                retain(tmp_path, 1)
        time.sleep(0.003 * delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = steps_found(tmp_path)
        clean(tmp_path)
        assert steps_found(tmp_path) == step
        assert all(name == "latest" or not verify(tmp_path / name) for name in names(tmp_path))
