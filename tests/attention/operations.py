"""What torch is asked to do in a stretch of code: the tensors that come out, and the times it waits for a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention.ops import attend as attend_module
from attention.ops import attend_op, project

OURS: dict[Any, Callable[..., Any]] = {
    torch.ops.attention.attend.default: attend_op._forward,
    torch.ops.attention.attend_backward.default: attend_op._backward,
    torch.ops.attention.gather_project.default: project._gather_project,
    torch.ops.attention.scatter_project.default: project._scatter_project,
    torch.ops.attention.gather_outer.default: project._gather_outer,
}
"""Operators of our own, and what they do; their insides are no calls that a mode would see."""

READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation returned, those inside our own operators included."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OURS:
            with self:
                out = OURS[func](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.numbers = max(self.numbers, t.numel() if isinstance(t, Tensor) else 0)
        return out


class Waits(TorchDispatchMode):
    """How often numbers of a tensor decide what is done next: there a GPU would have to catch up.

    `calls` counts them by name. Inside our own operators they are not seen: those choose their way by device.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.inside = False
        monkeypatch.setattr(attend_module, "_may_look", lambda x: False)  # as on a GPU
        tolist = Tensor.tolist

        def seen(x: Tensor) -> Any:
            self.calls["tolist"] += not self.inside
            return tolist(x)

        monkeypatch.setattr(Tensor, "tolist", seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in READS or masks:
            self.calls[func.name()] += 1
        self.inside = func in OURS
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = False
