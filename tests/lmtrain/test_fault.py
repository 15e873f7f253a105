"""Faults are injected where they were asked for, and nowhere else."""

import os
import signal

import pytest
import torch

from data.loader import Batch
from lmtrain import fault


def gradient(step):
    """Of the loss of a micro-batch with the samples 10 step and 10 step + 3."""
    rows = torch.zeros(2, 4, dtype=torch.long)
    batch = Batch(rows, rows, None, None, (10 * step, 10 * step + 3), True, 0)
    x = torch.ones(2, requires_grad=True)
    fault.before_backward(step, batch, x.sum()).backward()
    return x.grad


@pytest.mark.parametrize(
    "text", ["save", "save:bytes=x", "save:before=dawn", "step=7", "step=7:grad=inf", "step=-1:kill", "sample=7:kill"]
)
def test_an_unknown_fault_is_refused_by_name(monkeypatch, text):
    monkeypatch.setenv("LMTRAIN_FAULT", f"step=3:kill,{text}")
    with pytest.raises(ValueError, match=f"LMTRAIN_FAULT: '{text}'"):
        fault.before("commit")


@pytest.mark.parametrize(
    "text", [None, "", "step=8:grad=nan", "sample=71:grad=nan", "sample=70:tokens=random", "save:before=commit"]
)
def test_a_step_without_a_fault_is_untouched(monkeypatch, text):
    if text is None:
        monkeypatch.delenv("LMTRAIN_FAULT", raising=False)
    else:
        monkeypatch.setenv("LMTRAIN_FAULT", text)
    fault.before_update(7)
    assert torch.equal(gradient(7), torch.ones(2))


def test_gradients_become_nan_at_the_listed_steps(monkeypatch):
    monkeypatch.setenv("LMTRAIN_FAULT", "step=7:grad=nan, step=9:grad=nan")
    assert [step for step in range(12) if gradient(step).isnan().all()] == [7, 9]


def test_gradients_become_nan_where_a_sample_is_read(monkeypatch):
    monkeypatch.setenv("LMTRAIN_FAULT", "sample=73:grad=nan, sample=90:grad=nan, sample=84:grad=nan")
    assert [step for step in range(12) if gradient(step).isnan().all()] == [7, 9]


def test_kill_ends_the_process_at_its_step(monkeypatch):
    monkeypatch.setenv("LMTRAIN_FAULT", "step=3:kill")
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(3):
            fault.before_update(step)
        os.write(into, b"alive")
        fault.before_update(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert os.read(out, 10) == b"alive"
