"""The list says what there is and why; a repair loses nothing, and leaves what training goes on from."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from launch.cli import main
from lmtrain import checkpoint
from lmtrain.checkpoint.inventory import inventory, repair
from lmtrain.run.lock import Lock
from lmtrain.train import DONE, train
from tests.lmtrain import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1 to 4."""
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, {"model": {"x": torch.full((100,), float(step))}}, {"step": step})
    return tmp_path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def everything(folder: Path) -> list[bytes]:
    """The content of every file below checkpoints, wherever it lies."""
    return sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "latest")


def test_the_list(folder: Path) -> None:
    flip(folder / "step-4/model.safetensors")
    (folder / "step-2").rename(folder / "step-2.undone-0123abcd")
    (folder / "step-9.tmp-0123abcd").mkdir()
    entries = {entry.name: entry for entry in inventory(folder, keep=1)}
    names = ["step-4", "step-3", "step-1", "step-9.tmp-0123abcd", "step-2.undone-0123abcd"]
    assert list(entries) == names
    size = sum(file.stat().st_size for file in (folder / "step-3").iterdir())
    assert entries["step-3"].bytes == size
    rows = [entry.row for entry in entries.values()]
    assert [row["verified"] for row in rows] == [False, True, True, False, True]
    assert [row["complete"] for row in rows] == [True, True, True, False, True]
    words = ["damaged", "the newest that verifies", "older", "not finished", "roll-back"]
    assert all(word in row["why"] for word, row in zip(words, rows, strict=True))
    assert "model.safetensors" in rows[0]["problems"][0]
    assert inventory(folder / "nothing", keep=1) == []


def test_a_repair_of_nothing_changes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = repair(folder)
    assert (done.moved, done.renamed, done.newest) == ([], [], folder / "step-4")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.fault(3)
def test_a_repair_moves_the_damaged_and_deletes_nothing(folder: Path) -> None:
    flip(folder / "step-4/model.safetensors")
    (folder / "step-2/manifest.json").unlink()
    (folder / "latest").write_text("garbage")
    before = everything(folder)
    done = repair(folder)
    assert done.newest == folder / "step-3"
    assert [old.name for old, _, _ in done.moved] == ["step-4", "step-2"]
    assert everything(folder) == before
    assert (folder / "latest").read_text() == "step-3\n"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-1", "step-3"]
    assert len(list((folder / "damaged").iterdir())) == 2
    assert repair(folder).moved == []


@pytest.mark.fault(4)
def test_intact_ones_get_their_own_name_back(folder: Path) -> None:
    (folder / "step-4").rename(folder / "step-70")
    (folder / "step-3").rename(folder / "step-3.damaged-0123abcd")
    (folder / "step-1").rename(folder / "step-80")
    shutil.copytree(folder / "step-80", folder / "step-1")
    done = repair(folder)
    assert sorted(new.name for _, new in done.renamed) == ["step-3", "step-4"]
    assert [old.name for old, _, _ in done.moved] == ["step-80"], "its name is taken"
    assert done.newest == folder / "step-4"
    assert all(not checkpoint.verify(path) for path in folder.glob("step-*"))


def test_what_a_run_rolled_back_from_stays_aside(folder: Path) -> None:
    (folder / "step-4").rename(folder / "step-4.undone-0123abcd")
    assert repair(folder).newest == folder / "step-3"
    checkpoint.clean(folder)
    assert not (folder / "step-4").exists()
    checkpoint.retain(folder, keep=1)
    assert (folder / "step-4.undone-0123abcd").exists()
    checkpoint.save(folder, 5, {"model": {"x": torch.zeros(1)}}, {"step": 5})
    checkpoint.retain(folder, keep=1)
    assert [path.name for path in folder.glob("step-*")] == ["step-5"]


def test_undo_sets_aside_what_is_newer(folder: Path) -> None:
    checkpoint.undo(folder / "step-2")
    assert checkpoint.newest(folder)[0] == folder / "step-2"
    assert sorted(path.name.partition(".")[0] for path in folder.glob("step-*.undone-*")) == ["step-3", "step-4"]


def test_the_newest_up_to_a_step(folder: Path) -> None:
    flip(folder / "step-2/state.json")
    assert checkpoint.newest(folder, last=3)[0] == folder / "step-3"
    newest, rejected = checkpoint.newest(folder, last=2)
    assert newest == folder / "step-1"
    assert [path.name for path, _ in rejected] == ["step-2"]
    assert checkpoint.newest(folder, last=0) == (None, [])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny.config(tmp_path)) == DONE
    run = tmp_path / "run"
    flip(run / "checkpoints/step-12/optimizer.safetensors")
    capsys.readouterr()
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["name"], row["verified"]) for row in rows] == [("step-12", False), ("step-8", True), ("step-4", True)]
    assert main(["checkpoint", "list", str(run)]) == 0
    assert "optimizer.safetensors: its sha256" in capsys.readouterr().out
    lock = Lock(run / "lock")
    assert main(["checkpoint", "repair", str(run)]) == 2
    lock.release()
    assert "in use" in capsys.readouterr().err
    assert main(["checkpoint", "repair", str(run)]) == 0
    assert "training goes on from" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert train(tiny.config(tmp_path)) == DONE
    for path in (run / "checkpoints").glob("step-*"):
        flip(path / "state.json")
    for action in ("repair", "list"):
        assert main(["checkpoint", action, str(run)]) == 4
        assert "no " in capsys.readouterr().out
    assert main(["checkpoint", "list", str(tmp_path / "nothing")]) == 2
    assert main(["checkpoint", "verify", str(run), "--json"]) == 2
