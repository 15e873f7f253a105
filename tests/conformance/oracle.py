"""What the suite asks of each mixer's oracle: its definition, written without the code that it judges.

`oracles/<mixer>.py` holds

    cases() -> dict[str, Case]            settings to test, with windows and blocks of at most 16 tokens; the
                                          first has dim 48 and also stands for the mixer in a whole model
    definition(mixer, x, ctx) -> y        loops and masks, one document per row; of `mixer` only weights and
                                          settings are read. Never lifetimes, `attend`, selection, or a cache
    pairs(mixer, length) -> number        (query, key) pairs over all query heads, counted one by one
    dense_limit(dim, length) -> settings  those under which the mixer is multi-head attention

and may hold

    dense(mixer, x, ctx) -> y             what the limit equals, if it is not `multi_head_attention` below
    to_dense_limit(mixer) -> None         sets the weights that the limit asks for
    SELECTS = True                        keys are chosen by score: `cost` is an expectation
    BOUND = True                          how many are chosen depends on the scores, too: `cost` is a bound
    has_pattern(mixer) -> bool            whether `pattern(T)` tells all lifetimes; absent: not SELECTS
    ROUNDING = 1e-13                      largest change before a replaced token that is rounding; absent: 0

Shapes: B batch, T tokens, H query heads, G key heads, D head width. Everything is float64.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.mixer import Context, Mixer, build

FOLDER = Path(__file__).parent / "oracles"


@dataclass(frozen=True)
class Case:
    """One setting of a mixer."""

    settings: dict[str, Any] = field(default_factory=dict)
    dim: int = 48


def missing(kind: str) -> str | None:
    """What to write if the mixer has no oracle."""
    file = FOLDER / f"{kind}.py"
    if file.is_file():
        return None
    return f"the mixer {kind!r} has no oracle: write tests/conformance/oracles/{file.name} (see oracle.py)"


@cache
def load(kind: str) -> ModuleType:
    """The oracle of a mixer, found by its name."""
    spec = importlib.util.spec_from_file_location(f"oracle_of_{kind}", FOLDER / f"{kind}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Subject:
    """A mixer in one setting, with its oracle."""

    kind: str
    case: Case

    @property
    def oracle(self) -> ModuleType:
        """The module of the definition."""
        return load(self.kind)

    @property
    def selects(self) -> bool:
        """Whether keys are chosen by score."""
        return getattr(self.oracle, "SELECTS", False)

    @property
    def bounded(self) -> bool:
        """Whether `cost` says no more of pairs and flops than a bound."""
        return getattr(self.oracle, "BOUND", False)

    @property
    def rounding(self) -> float:
        """Largest change before a replaced token that counts as rounding."""
        return getattr(self.oracle, "ROUNDING", 0.0)

    def has_pattern(self, mixer: Mixer) -> bool:
        """Whether the lifetimes of all keys are known before the tokens, in one order."""
        return getattr(self.oracle, "has_pattern", lambda mixer: not self.selects)(mixer)

    def mixer(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
        """The mixer with weights that are all different and of order one, also those that start at zero."""
        torch.manual_seed(seed)
        mixer = build(self.kind, self.case.dim, **self.case.settings).to(dtype)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return mixer

    def fresh(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
        """The mixer as it is born."""
        torch.manual_seed(seed)
        return build(self.kind, self.case.dim, **self.case.settings).to(dtype)


# What definitions of softmax mixers share: the projections of `attention.softmax`, spelled out.


def heads(x: Tensor, weight: Tensor, number: int) -> Tensor:
    """x [B, T, d] W [number D, d] -> [B, number, T, D]."""
    return (x @ weight.T).unflatten(2, (number, -1)).transpose(1, 2)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary at positions 0..T-1: features (j, j + D/2) as one complex number, turned by p base^(-2j/D)."""
    if not base:
        return x
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:])
    angle = [[p * base ** (-j / half) for j in range(half)] for p in range(x.shape[-2])]
    turned = turned * torch.exp(1j * torch.tensor(angle, dtype=torch.float64))
    return torch.cat([turned.real, turned.imag], -1)


def projections(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, all [B, H, T, D]: head h holds a copy of key head h // (H / G)."""
    config = mixer.config
    kv_heads = config.kv_heads or config.heads
    width = mixer.qkv.weight.shape[0] // (config.heads + 2 * kv_heads)
    w_q, w_k, w_v = mixer.qkv.weight.split([config.heads * width, kv_heads * width, kv_heads * width])
    q = rotate(heads(x, w_q, config.heads), config.rotary)
    k = rotate(heads(x, w_k, kv_heads), config.rotary)
    v = heads(x, w_v, kv_heads)
    of_head = [head // (config.heads // kv_heads) for head in range(config.heads)]
    return q, k[:, of_head], v[:, of_head]


def masked_attention(mixer: Any, x: Tensor, allowed: Tensor) -> Tensor:
    """y of softmax attention in which a query meets the keys that `allowed` [T, T] or [H, T, T] says; 0 from nobody."""
    q, k, v = projections(mixer, x)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    alone = ~allowed.any(-1, keepdim=True)
    weights = logits.masked_fill(~(allowed | alone), -torch.inf).softmax(-1).masked_fill(alone, 0.0)
    return (weights @ v).transpose(1, 2).flatten(2) @ mixer.output.weight.T


def multi_head_attention(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """y of full causal attention by torch's own operation."""
    q, k, v = projections(mixer, x)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(out.transpose(1, 2).flatten(2), mixer.output.weight)


def triangle(length: int) -> Tensor:
    """[T, T]: key j is not behind query i."""
    return torch.ones(length, length, dtype=torch.bool).tril()
