"""What a mixer reports to whoever watches: scalars that are explained, and nothing else happens."""

import re
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention.mixer import Context, Mixer
from tests.conformance.oracle import Subject
from tests.documents import ROOT


class Waits(TorchDispatchMode):
    """Counts how often the host asks the device for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def passed(mixer: Mixer, x: Tensor, statistics: dict[str, Tensor] | None) -> tuple[int, list[Tensor]]:
    """How often a pass in training waited, and what came of it: output, losses, all gradients."""
    with Waits() as waits:
        y, losses = mixer(x, Context(statistics=statistics))
        total = sum(losses.values(), y.square().sum())
        gradients = torch.autograd.grad(total, [p for p in mixer.parameters() if p.requires_grad], allow_unused=True)
    return waits.number, [y, *losses.values(), *(g for g in gradients if g is not None)]


def explained(kind: str) -> set[str]:
    """The statistics of a mixer in the table of the documentation."""
    page = (ROOT / "docs/watching.md").read_text()
    section = re.search(rf"^### `{kind}`\n(.*?)(?=^##|\Z)", page, re.S | re.M)
    first_cells = re.findall(r"^\|([^|]*)\|", section.group(1), re.M) if section else []
    return {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}


def test_watching_changes_nothing_and_waits_for_nothing(subject: Subject) -> None:
    x = torch.randn(2, 40, subject.case.dim, dtype=torch.float64)
    mixer, statistics = subject.mixer(), {}
    passed(mixer, x, None)  # tables that are kept from now on
    unwatched, expected = passed(mixer, x, None)
    watched, found = passed(mixer, x, statistics)
    assert watched == unwatched
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for name, value in statistics.items():
        assert value.shape == (), name
        assert value.isfinite(), name
        assert not value.requires_grad, name


def test_what_is_reported_is_explained(subject: Subject) -> None:
    statistics: dict[str, Tensor] = {}
    subject.mixer()(torch.randn(2, 40, subject.case.dim, dtype=torch.float64), Context(statistics=statistics))
    assert statistics.keys() <= explained(subject.kind), f"docs/watching.md, {subject.kind}: explain each statistic"
