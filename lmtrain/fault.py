"""Faults on purpose, to see that a run survives them: `LMTRAIN_FAULT`, a comma-separated list of

    save:bytes=N           SIGKILL when this process has written N bytes of checkpoints
    save:before=POINT      SIGKILL before a save's `commit`, `latest` or `retention`
    step=N:grad=nan        the gradients of optimizer step N become NaN
    step=N:kill            SIGKILL before the update of optimizer step N
    step=N:stall           SIGSTOP there: the process stands still
    step=N:raise           RuntimeError there
    step=N:term            SIGTERM there
    sample=N:tokens=random the micro-batch with sample N holds random tokens, whenever it is read
    sample=N:grad=nan      the gradients of that micro-batch become NaN

of all ranks, or with `:rank=R` behind it of one. Unset, as in every real run, each hook is one look at the environment
and returns.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from data.loader import Batch

VARIABLE = "LMTRAIN_FAULT"
_GRAMMAR = re.compile(
    r"(?P<what>save:bytes=[0-9]+|save:before=(?:commit|latest|retention)|step=[0-9]+:(?:grad=nan|kill|stall|raise|term)"
    r"|sample=[0-9]+:(?:tokens=random|grad=nan))"
    r"(?::rank=(?P<rank>[0-9]+))?"
)
_checkpoint_bytes = 0  # counted only while a `save:bytes` fault is set


@cache
def parse(text: str, rank: str = "0") -> frozenset[str]:
    """The faults of a value of `LMTRAIN_FAULT` that are those of `rank`; ValueError for one that is none."""
    faults = set()
    for part in filter(None, map(str.strip, text.split(","))):
        fault = _GRAMMAR.fullmatch(part)
        if not fault:
            raise ValueError(f"{VARIABLE}: {part!r} is no fault; see the head of lmtrain/fault.py")
        if fault["rank"] in (None, rank):
            faults.add(fault["what"])
    return frozenset(faults)


def before_write(descriptor: int, data: memoryview) -> None:
    """Called with each piece of a checkpoint about to be written: dies in the middle of the chosen one."""
    global _checkpoint_bytes
    for fault in _faults():
        if fault.startswith("save:bytes="):
            room = int(fault.removeprefix("save:bytes=")) - _checkpoint_bytes
            if room <= len(data):
                os.write(descriptor, data[: max(room, 0)])
                _die()
            _checkpoint_bytes += len(data)


def before(point: str) -> None:
    """Called before the `commit`, `latest` and `retention` of a save."""
    if f"save:before={point}" in _faults():
        _die()


def before_forward(batch: Batch) -> Batch:
    """Called with each micro-batch: the same, or one of random tokens that nobody can predict."""
    return _scrambled(batch) if _is_about(batch, "tokens=random") else batch


def before_backward(step: int, batch: Batch, loss: Tensor) -> Tensor:
    """Called with the loss of each micro-batch of step `step`: the same, or one whose gradients are NaN. (Of gradients
    themselves an engine may have made something else by the time of the update.)"""
    spoilt = f"step={step}:grad=nan" in _faults() or _is_about(batch, "grad=nan")
    return loss * float("nan") if spoilt else loss


def before_update(step: int) -> None:
    """Called between the backward and the update of step `step`."""
    faults = _faults()
    if f"step={step}:kill" in faults:
        _die()
    if f"step={step}:stall" in faults:
        os.kill(os.getpid(), signal.SIGSTOP)
    if f"step={step}:raise" in faults:
        raise RuntimeError(f"raised on purpose at step {step}")
    if f"step={step}:term" in faults:
        os.kill(os.getpid(), signal.SIGTERM)


def _is_about(batch: Batch, what: str) -> bool:
    """Whether one of its samples has this fault."""
    faults = _faults()
    return bool(faults) and any(f"sample={sample}:{what}" in faults for sample in batch.samples)


def _scrambled(batch: Batch) -> Batch:
    generator = torch.Generator().manual_seed(batch.first_sample)
    tokens, labels = (
        torch.randint(int(batch.tokens.max()) + 1, batch.tokens.shape, generator=generator) for _ in range(2)
    )
    return replace(batch, tokens=tokens, labels=labels.where(batch.labels >= 0, batch.labels))


def _faults() -> frozenset[str]:
    text = os.environ.get(VARIABLE)
    return parse(text, os.environ.get("RANK", "0")) if text else frozenset()


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")
