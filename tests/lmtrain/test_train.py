"""A run resumes to the same weights, bit for bit, however it was stopped; and says how it ended."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain import checkpoint
from lmtrain.config import ConfigError, reload
from lmtrain.run import read_metrics, read_status
from lmtrain.setup import checkpoint_bytes
from lmtrain.train import DONE, GAVE_UP, STOPPED, train
from tests.lmtrain import tiny
from tests.processes import SECONDS, wait_until


def outcome(run: Path, step: int = 12) -> tuple[list[Any], dict[str, dict[str, torch.Tensor]]]:
    """What must not depend on interruptions: the rows but for their speed, and all tensors of the last checkpoint."""
    rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(run)]
    return rows, checkpoint.load(run / f"checkpoints/step-{step}").tensors


def assert_same(one: Path, other: Path, step: int = 12) -> None:
    rows, tensors = outcome(one, step)
    other_rows, other_tensors = outcome(other, step)
    assert rows == other_rows
    assert tensors.keys() == other_tensors.keys()
    for group, members in tensors.items():
        assert members.keys() == other_tensors[group].keys()
        for name, tensor in members.items():
            assert torch.equal(tensor, other_tensors[group][name]), f"{group} {name}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(tiny.config(folder)) == DONE
    return folder / "run"


def test_the_folder_of_a_finished_run(undisturbed: Path) -> None:
    status = read_status(undisturbed)
    assert status is not None
    assert (status.state, status.step, status.checkpoint) == ("done", 12, "checkpoints/step-12")
    rows = read_metrics(undisturbed)
    steps = [row for row in rows if "split" not in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"} <= steps[0].keys()
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["tokens"] == 12 * 128
    evaluations = [row for row in rows if "split" in row]
    assert [row["step"] for row in evaluations] == [4, 8, 12]
    assert {"split", "loss", "bits_per_byte"} <= evaluations[0].keys()
    for name in ("config.yaml", "environment.json", "log.txt", "status.json"):
        assert (undisturbed / name).stat().st_size > 0


def test_a_finished_run_is_left_alone(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*.safetensors")}
    assert train(tiny.config(undisturbed.parent)) == DONE
    assert "is finished" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in undisturbed.rglob("*.safetensors")}


def test_a_run_goes_on_without_the_samples_of_a_spike(undisturbed: Path, tmp_path: Path) -> None:
    assert tiny.command(tmp_path, fault="step=7:kill").wait(SECONDS) == -signal.SIGKILL
    assert train(tiny.config(tmp_path, "data.skip=16:18, 21:29")) == DONE  # from step 4, which has read 0 to 15
    state = checkpoint.load(tmp_path / "run/checkpoints/step-12").state
    assert state["samples"] == 12 * 4 + 10
    losses = [[row["loss"] for row in outcome(run)[0] if "split" not in row] for run in (undisturbed, tmp_path / "run")]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0][4] != losses[1][4]


@pytest.mark.fault(1, 5)
@pytest.mark.parametrize("fault", ["step=1:kill", "step=7:kill", "save:before=commit", "save:bytes=9000"])
def test_kill_9_and_the_same_command_again(undisturbed: Path, tmp_path: Path, fault: str) -> None:
    killed = tiny.command(tmp_path, fault=fault)
    assert killed.wait(SECONDS) == -signal.SIGKILL, killed.stdout.read() if killed.stdout else ""
    again = tiny.command(tmp_path)
    text, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == DONE, text
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(7)
def test_sigterm_saves_at_the_step_boundary_and_exits_75(undisturbed: Path, tmp_path: Path) -> None:
    running = tiny.command(tmp_path, "train.steps=100000", "eval.every=0")
    log = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= 3)
    running.send_signal(signal.SIGTERM)
    text, _ = running.communicate(timeout=SECONDS)
    assert running.returncode == STOPPED, text
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.reason) == ("stopped", "SIGTERM")
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert status.checkpoint == f"checkpoints/step-{last}"


@pytest.mark.fault(7)
def test_ctrl_c_while_evaluating(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every evaluation once, the last one too: the same command makes up for it."""
    import lmtrain.evaluation.validation as module

    real = module.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    for step in (4, 8, 12):
        with monkeypatch.context() as patched:
            patched.setattr(module, "evaluate", interrupted)
            if step > 4:  # what was missed comes first
                assert train(tiny.config(tmp_path)) == STOPPED
                assert read_status(tmp_path / "run").step == step - 4  # type: ignore[union-attr]
            calls = iter([real, interrupted] if step > 4 else [interrupted])
            patched.setattr(module, "evaluate", lambda *args, calls=calls, **kwargs: next(calls)(*args, **kwargs))
            assert train(tiny.config(tmp_path)) == STOPPED
            assert read_status(tmp_path / "run").step == step  # type: ignore[union-attr]
    assert train(tiny.config(tmp_path)) == DONE
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(3)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write(tmp_path)
    shutil.copytree(undisturbed, tmp_path / "run")
    _flip(tmp_path / "run/checkpoints/step-12/model.safetensors")
    assert train(tiny.config(tmp_path)) == DONE
    said = capsys.readouterr().err
    assert "step-12 is damaged" in said
    assert "resumed at step 8" in said
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(4)
def test_all_checkpoints_damaged_stops_unless_fresh(undisturbed: Path, tmp_path: Path) -> None:
    tiny.write(tmp_path)
    shutil.copytree(undisturbed, tmp_path / "run")
    for file in (tmp_path / "run/checkpoints").glob("step-*/model.safetensors"):
        _flip(file)
    with pytest.raises(ValueError, match="--fresh"):
        train(tiny.config(tmp_path))
    assert train(tiny.config(tmp_path), fresh=True) == DONE
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault(4)
def test_resuming_from_something_damaged_never_starts_from_zero(undisturbed: Path, tmp_path: Path) -> None:
    tiny.write(tmp_path)
    copy = shutil.copytree(undisturbed / "checkpoints/step-8", tmp_path / "step-8")
    _flip(copy / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"optimizer\.safetensors"):
        train(tiny.config(tmp_path), resume=copy)
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_fork_goes_on_from_a_checkpoint_with_another_schedule(undisturbed: Path, tmp_path: Path) -> None:
    tiny.write(tmp_path)
    parent = undisturbed / "checkpoints/step-8"
    config = tiny.config(tmp_path, "train.steps=10", "optimizer.schedule=wsd", "optimizer.decay=0.2")
    assert train(config, resume=parent) == DONE
    rows = [row for row in read_metrics(tmp_path / "run") if "split" not in row]
    assert [row["step"] for row in rows] == [9, 10]
    expected = [row["batch"] for row in read_metrics(undisturbed) if "split" not in row]
    assert [row["batch"] for row in rows] == expected[8:10]
    state = checkpoint.load(tmp_path / "run/checkpoints/step-10").state
    assert state["parent"] == str(parent)


def test_an_older_checkpoint_of_a_run_that_went_on_is_refused(undisturbed: Path) -> None:
    with pytest.raises(ValueError, match=r"step-12.*new run\.dir"):
        train(tiny.config(undisturbed.parent), resume=undisturbed / "checkpoints/step-8")


def test_another_config_in_the_same_folder_is_refused(undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr=0.5: was 0.001 when this run began"):
        tiny.config(undisturbed.parent, "optimizer.lr=0.5")
    tiny.config(undisturbed.parent, "log.every=5", "checkpoint.keep=2")


@pytest.mark.fault(14)
def test_other_data_than_the_checkpoint_saw_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    tiny.write(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"something else altogether. " * 200)
    with pytest.raises(ValueError, match="other data"):
        train(tiny.config(tmp_path), resume=undisturbed / "checkpoints/step-8")


@pytest.mark.fault(9)
def test_an_update_that_is_not_finite_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_FAULT", "step=9:grad=nan")
    assert train(tiny.config(tmp_path, "checkpoint.every=1", "checkpoint.keep=20")) == DONE
    before, after = (checkpoint.load(tmp_path / f"run/checkpoints/step-{step}").tensors for step in (8, 9))
    for group in before:
        for name, tensor in before[group].items():
            assert torch.equal(tensor, after[group][name]), name
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run") if "split" not in row}
    assert (rows[8]["skipped"], rows[9]["skipped"], rows[12]["skipped"]) == (0, 1, 1)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "skip"] == [9]


@pytest.mark.fault(9)
def test_giving_up_when_nothing_is_finite_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_FAULT", "step=5:grad=nan,step=6:grad=nan")
    assert train(tiny.config(tmp_path, "train.max_skips=2")) == GAVE_UP
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.checkpoint) == ("failed", "checkpoints/step-4")
    assert "2 updates in a row" in status.reason


def test_documents_and_characters_and_muon_train(tmp_path: Path) -> None:
    config = tiny.config(
        tmp_path, "data.documents=reset", "data.tokenizer=characters", "optimizer.kind=muon",
        "train.activation_checkpointing=true", "train.dtype=bfloat16",
    )  # fmt: skip
    assert train(config) == DONE
    rows = [row for row in read_metrics(tmp_path / "run") if "split" not in row]
    assert rows[-1]["loss"] < rows[0]["loss"]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_the_size_of_a_checkpoint_is_known_without_weights(undisturbed: Path) -> None:
    config = reload(undisturbed)
    size = sum(file.stat().st_size for file in (undisturbed / "checkpoints/step-12").glob("*.safetensors"))
    assert abs(checkpoint_bytes(config) - checkpoint.bytes_needed({}) - size) < 1000
