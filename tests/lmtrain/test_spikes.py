"""Spikes are told from what is usual, and met as the policy says: by all ranks, and the same after any interruption."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmtrain import checkpoint
from lmtrain.run import read_metrics, read_status
from lmtrain.spikes import FINEST, LEAST, WINDOW, Spikes, Usual, Verdict
from lmtrain.train import DONE, GAVE_UP, train
from tests.lmtrain import tiny
from tests.lmtrain.test_ranks import run as run_ranked
from tests.processes import SECONDS

STEPS = 44
BAD = 40  # the step that reads sample 4 * 39, of four a step
SPIKE = f"sample={4 * (BAD - 1)}:tokens=random"
LONG = [f"train.steps={STEPS}", "eval.every=0", "checkpoint.every=12", "checkpoint.keep=9", "train.micro_batch=4"]
LONG += ["optimizer.lr=1e-2", "model.dropout=0", "train.spike_limit=3"]  # a young run varies a lot


def deviations(known: np.ndarray, value: float) -> float:
    """The definition, by numpy; its constants written out."""
    middle = np.median(known[-128:])
    spread = max(1.4826 * np.median(np.abs(known[-128:] - middle)), 0.01)
    return float((value - middle) / spread)


def test_it_is_its_definition() -> None:
    values = np.random.default_rng(0).standard_t(2, 300).tolist()
    usual = Usual()
    found = [usual.judge(value) for value in values]
    assert found[:LEAST] == [0.0] * LEAST
    expected = [deviations(np.array(values[:step]), values[step]) for step in range(LEAST, 300)]
    assert found[LEAST:] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_of_normal_values_a_deviation_is_the_standard_deviation() -> None:
    usual = Usual()
    for value in 3 + 0.3 * np.random.default_rng(1).standard_normal(WINDOW):
        usual.judge(float(value))
    assert usual.judge(3 + 6 * 0.3) == pytest.approx(6, rel=0.3)


def test_outliers_do_not_hide_the_next_one() -> None:
    usual = Usual()
    for value in np.random.default_rng(2).uniform(2.0, 2.2, 100):
        usual.judge(float(value))
    assert min(usual.judge(9.0) for _ in range(30)) > 6


def test_what_does_not_vary_is_measured_by_the_finest_deviation() -> None:
    usual = Usual([2.0] * WINDOW)
    assert usual.judge(2.0) == 0
    assert usual.judge(2.0 + 5 * FINEST) == pytest.approx(5)


def test_gradient_norms_are_judged_by_factors() -> None:
    norms = np.random.default_rng(4).lognormal(0.0, 0.5, 100)
    verdicts = []
    for scale in (1.0, 1000.0):
        spikes = Spikes()
        for norm in norms:
            spikes.judge(2.0, float(norm) * scale)
        verdicts.append(spikes.judge(2.0, 30.0 * scale).grad_norm)
    assert verdicts[0] == pytest.approx(verdicts[1], rel=1e-6)
    assert verdicts[0] > 5
    assert Spikes().judge(2.0, 0.0).grad_norm == 0


def test_a_spike_of_either_is_one() -> None:
    assert Verdict(6.1, 0.0).beyond(6.0)
    assert Verdict(0.0, 12.1).beyond(6.0)
    assert not Verdict(5.9, 11.9).beyond(6.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_spike_and_is_forgotten(value: float) -> None:
    usual = Usual([0.0, 0.1] * 30)
    assert usual.judge(value) == 0
    assert list(usual.values) == [0.0, 0.1] * 30


def test_its_state_survives_json_bit_by_bit() -> None:
    values = np.random.default_rng(3).lognormal(size=(200, 2)).tolist()
    whole, before, after = Spikes(), Spikes(), Spikes()
    for loss, norm in values[:150]:
        whole.judge(loss, norm)
        before.judge(loss, norm)
    after.load(json.loads(json.dumps(before.state())))
    assert [after.judge(*pair) for pair in values[150:]] == [whole.judge(*pair) for pair in values[150:]]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def steps(run: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in read_metrics(run) if "split" not in row}


def trained(folder: Path, *words: str, fault: str = "", code: int = DONE) -> Path:
    """The folder of a run with a fault."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMTRAIN_FAULT", fault)
        assert train(tiny.config(folder, *LONG, *words)) == code
    return folder / "run"


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without spikes."""
    return trained(tmp_path_factory.mktemp("usual"))


@pytest.mark.fault(10)
def test_usual_steps_are_no_spikes(usual: Path) -> None:
    assert events(usual, "spike") == []


@pytest.mark.fault(10)
def test_log_tells_and_goes_on(usual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, fault=SPIKE)
    assert f"spike at step {BAD}" in capsys.readouterr().err
    (event,) = events(run, "spike")
    assert (event["step"], event["policy"], event["samples"]) == (BAD, "log", [4 * (BAD - 1), 4 * BAD])
    assert event["loss"] == steps(run)[BAD]["loss"] > steps(usual)[BAD]["loss"]
    assert event["deviations"]["loss"] > 3
    assert steps(run)[STEPS]["skipped"] == 0
    assert [row["batch"] for row in steps(run).values()] == [row["batch"] for row in steps(usual).values()]


def test_a_higher_limit_is_not_reached(tmp_path: Path) -> None:
    assert events(trained(tmp_path, "train.spike_limit=1e9", fault=SPIKE), "spike") == []


@pytest.mark.fault(10)
def test_skip_changes_no_weight_and_no_moment(tmp_path: Path) -> None:
    run = trained(tmp_path, "train.spikes=skip", "checkpoint.every=1", "checkpoint.keep=50", fault=SPIKE)
    before, after = (checkpoint.load(run / f"checkpoints/step-{step}").tensors for step in (BAD - 1, BAD))
    for group, members in before.items():
        for name, tensor in members.items():
            assert torch.equal(tensor, after[group][name]), name
    assert [event["step"] for event in events(run, "skip")] == [BAD]
    assert steps(run)[STEPS]["skipped"] == 1


@pytest.mark.fault(10)
def test_rollback_never_reads_the_samples_again(usual: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, "train.spikes=rollback", fault=SPIKE)
    (event,) = events(run, "rollback")
    left_out = [4 * 36, 4 * BAD]
    assert (event["step"], event["to"], event["samples"]) == (BAD, 36, left_out)
    # The same as a run that was told at its checkpoint to leave them out.
    by_hand = tmp_path / "by-hand"
    trained(by_hand, "train.steps=36", "optimizer.warmup=0", "optimizer.schedule=constant")
    told = [f"data.skip={left_out[0]}:{left_out[1]}", "optimizer.warmup=0", "optimizer.schedule=constant"]
    config = tiny.config(tmp_path, *LONG, *told, f"run.dir={by_hand}/on")
    assert train(config, resume=by_hand / "run/checkpoints/step-36") == DONE
    batches = [[row["batch"] for step, row in steps(each).items() if step > 36] for each in (run, by_hand / "on")]
    assert batches[0] == batches[1]
    assert list(steps(run)) == list(range(1, STEPS + 1)), "each step has one row"
    rows, before = steps(run), steps(usual)
    assert [rows[step]["loss"] for step in range(1, 37)] == [before[step]["loss"] for step in range(1, 37)]
    state = checkpoint.load(run / f"checkpoints/step-{STEPS}").state
    assert (state["samples"], state["unread"], state["rollbacks"]) == (4 * (STEPS + 4), [left_out], 1)


@pytest.mark.fault(10)
@pytest.mark.slow
@pytest.mark.parametrize("kill", [38, 43])
def test_a_kill_before_or_behind_a_rollback_changes_nothing(tmp_path: Path, kill: int) -> None:
    words = [*LONG, "train.spikes=rollback", "checkpoint.every=6"]
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", *words, fault=SPIKE)
    killed = tiny.command(tmp_path, *words, fault=f"{SPIKE},step={kill}:kill")
    assert killed.wait(SECONDS) == -signal.SIGKILL
    run = trained(tmp_path, *words, fault=SPIKE)
    rows, expected = steps(run), steps(whole)
    assert [row["loss"] for row in rows.values()] == [row["loss"] for row in expected.values()]
    assert [row["batch"] for row in rows.values()] == [row["batch"] for row in expected.values()]


@pytest.mark.fault(9)
def test_checkpoints_of_the_trouble_step_aside(tmp_path: Path) -> None:
    words = ["train.max_skips=2", "checkpoint.every=1", "train.steps=12", "train.max_rollbacks=1"]
    run = trained(tmp_path, *words, fault="step=8:grad=nan,step=9:grad=nan", code=GAVE_UP)
    (event,) = events(run, "rollback")
    assert (event["step"], event["to"]) == (9, 7)
    assert len(list((run / "checkpoints").glob("step-8.undone-*"))) == 1
    status = read_status(run)
    assert status is not None
    assert "2 updates in a row" in status.reason
    assert "after 1 roll-back" in status.reason
    assert train(tiny.config(tmp_path, *LONG, *words)) == DONE, "without the fault it goes on"


@pytest.mark.fault(10)
def test_spikes_without_end_end_the_run(tmp_path: Path) -> None:
    faults = ",".join(f"sample={sample}:tokens=random" for sample in range(4 * (BAD - 1), 4 * (BAD + 40), 4))
    words = ["train.spikes=rollback", "train.max_rollbacks=2"]
    run = trained(tmp_path, *words, fault=faults, code=GAVE_UP)
    assert len(events(run, "rollback")) == 2
    assert read_status(run).state == "failed"  # type: ignore[union-attr]


@pytest.mark.fault(10)
def test_a_spike_before_the_first_checkpoint_is_only_told(tmp_path: Path) -> None:
    run = trained(tmp_path, "train.spikes=rollback", "checkpoint.every=100", fault=SPIKE)
    assert len(events(run, "spike")) == 1
    assert events(run, "rollback") == []


@pytest.mark.fault(10)
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_two_ranks_do_as_one(tmp_path: Path, policy: str) -> None:
    tiny.write(tmp_path)
    words = [*LONG, f"train.spikes={policy}", "train.micro_batch=2"]
    fault = f"{SPIKE},sample={4 * (BAD - 1) + 2}:tokens=random"
    for ranks in (1, 2):
        assert run_ranked(ranks, tmp_path, str(ranks), *words, fault=fault) == [DONE] * ranks
    alone, together = (steps(tmp_path / name) for name in "12")
    assert list(alone) == list(together)
    assert [row["batch"] for row in alone.values()] == [row["batch"] for row in together.values()]
    assert [row["skipped"] for row in alone.values()] == [row["skipped"] for row in together.values()]
    kinds = [[len(events(tmp_path / name, kind)) for kind in ("spike", "skip", "rollback")] for name in "12"]
    assert kinds[0] == kinds[1] == [1, policy == "skip", policy == "rollback"]


@pytest.mark.fault(10)
def test_nothing_of_it_depends_on_a_resume(tmp_path: Path, usual: Path) -> None:
    killed = tiny.command(tmp_path, *LONG, fault="step=39:kill")
    assert killed.wait(SECONDS) == -signal.SIGKILL
    run = trained(tmp_path)
    states = [checkpoint.load(each / f"checkpoints/step-{STEPS}").state["spikes"] for each in (run, usual)]
    assert states[0] == states[1]
    assert len(states[0]["loss"]) == STEPS
