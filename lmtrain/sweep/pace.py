"""How fast runs are: as measured by those that are done, before that by a guess."""

from __future__ import annotations

import time
from statistics import median

import torch

from lmtrain.hardware import pick_device
from lmtrain.sweep.folder import SweepFolder
from lmtrain.sweep.plan import Plan

SHARE = 0.25
"""Of the FLOP/s of a matrix product that a small model trains with, about."""

WIDTH = 512
SECONDS = 0.05


def pace_of(plan: Plan, folder: SweepFolder) -> tuple[float, str]:
    """FLOP/s of training, and where the number comes from."""
    results = [result for run in plan.runs if (result := folder.result(run)) is not None]
    if results:
        return median(each.flops / each.seconds for each in results), f"as {len(results)} finished runs had"
    return SHARE * _product_flops(), "a guess until a run is done"


def _product_flops() -> float:
    """FLOP/s of a matrix product on this device."""
    device = pick_device()
    x = torch.ones(WIDTH, WIDTH, device=device)
    float((x @ x)[0, 0])
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        float((x @ x)[0, 0])
        count += 1
    return 2 * WIDTH**3 * count / (time.perf_counter() - began)
