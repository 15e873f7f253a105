"""What a mixer's state holds, as plain data and tensors that a checkpoint can keep; and back.

A state's attributes are tensors, numbers, text, and dicts, lists, tuples and objects of them. All of it is kept but
settings, which its mixer gives it: attributes called `config` and `limit`. Nothing is made of what was read but such
values: the class of each object is that of its counterpart in a new state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SETTINGS = ("config", "limit")


def take_snapshot(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """(JSON, tensors by name) of a state. An object that is reached twice is kept once, and is one again."""
    tensors: dict[str, Tensor] = {}
    return _take(value, "state", tensors, {}), tensors


def restore(kept: Any, tensors: Mapping[str, Tensor], new: Any, device: torch.device | str = "cpu") -> Any:
    """The state of which `take_snapshot` made `kept` and `tensors`, from a `new` one of the same mixer and batch.

    ValueError if it belongs to another mixer or batch.
    """
    tensors = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    try:
        return _restore(kept, tensors, new, "state", {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it does not fit: {error}") from None


def _take(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[int, tuple[str, Any]]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in seen:
        return {"same": seen[id(value)][0]}
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    seen[id(value)] = name, value  # the value too: its number may not pass to another while we look
    if isinstance(value, dict):
        return {"dict": {key: _take(part, f"{name}.{key}", tensors, seen) for key, part in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_take(part, f"{name}.{i}", tensors, seen) for i, part in enumerate(value)]}
    parts = {key: part for key, part in vars(value).items() if key not in SETTINGS}
    return {"object": {key: _take(part, f"{name}.{key}", tensors, seen) for key, part in parts.items()}}


def _restore(kept: Any, tensors: Mapping[str, Tensor], new: Any, name: str, made: dict[str, Any]) -> Any:
    if not isinstance(kept, dict):
        return kept
    ((kind, content),) = kept.items()
    if kind == "same":
        return made[content]
    if kind == "tensor":
        return _like(tensors[content], new, name)
    whole = _container(kind, content, new, name)
    made[name] = whole
    parts: dict[Any, Any] = dict(enumerate(content)) if kind in ("list", "tuple") else content
    like = dict(enumerate(new)) if isinstance(new, list | tuple) else getattr(new, "__dict__", new) or {}
    for key, part in parts.items():
        value = _restore(part, tensors, like.get(key), f"{name}.{key}", made)
        if kind == "object":
            setattr(whole, key, value)
        elif kind == "dict":
            whole[key] = value
        else:
            whole.append(value)
    if kind == "tuple":
        made[name] = whole = tuple(whole)
    return whole


def _container(kind: str, content: Any, new: Any, name: str) -> Any:
    """What the restored parts go into: an empty list or dict, or a copy of the new object."""
    if kind in ("list", "tuple"):
        return []
    if kind == "dict":
        return {}
    if kind != "object" or not hasattr(new, "__dict__") or not vars(new).keys() >= content.keys():
        raise ValueError(f"{name} belongs to another mixer")
    return copy.copy(new)


def _like(tensor: Tensor, new: Any, name: str) -> Tensor:
    if not isinstance(new, Tensor):
        return tensor
    if tensor.dim() != new.dim() or tensor.shape[:1] != new.shape[:1] or tensor.dtype != new.dtype:
        was, now = (f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (tensor, new))
        raise ValueError(f"{name} is {was}, expected {now}: it belongs to another mixer or batch")
    return tensor
