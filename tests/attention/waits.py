"""How often a stretch of code waits for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention.ops import attend as attend_module

READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
)


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
        self.inside = func.namespace == "attention"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = False
