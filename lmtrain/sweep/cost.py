"""What a model costs, from the costs that its mixers state: nothing is built twice, so thousands of models are cheap.

`DecoderLM.cost` says the same of a model that was made.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attention.mixer import Cost, build
from lmtrain.config import Config, ModelConfig
from lmtrain.model import pattern_of

MATRICES_OF_FFN = {"swiglu": 3, "gelu": 2}


@dataclass(frozen=True)
class ModelCost:
    """cost: of the whole model for one sequence; embedding: the parameters of its embedding, positions and head;
    strict: whether no mixer sees later tokens."""

    cost: Cost
    embedding: int
    strict: bool


def model_cost(whole: Config, length: int | None = None) -> ModelCost:
    """The cost of one sequence of `length` tokens, by default data.seq_len. A vocabulary not known yet is assumed.

    ValueError if a mixer cannot be made as configured.
    """
    config, vocabulary = whole.model, whole.assumed_vocabulary
    length = whole.data.seq_len if length is None else length
    matrices = MATRICES_OF_FFN[config.ffn] * config.dim * config.hidden
    norms = (2 * config.layers + 1) * config.dim
    rows = vocabulary + (0 if config.tied else vocabulary) + (config.learned_positions or 0)
    head = 2 * length * config.dim * vocabulary
    fixed = Cost(rows * config.dim + norms, head, 0, 0)
    total = _add(fixed, config.layers, Cost(matrices, 2 * length * matrices, 0, 0))
    strict, shared = True, set()
    for name, count in Counter(name for names in pattern_of(config) for name in names).items():
        mixer = _mixer(config.dim, _frozen(config.mixers[name]), length)
        strict = strict and mixer.strict
        states = count if mixer.shared_state is None else int(mixer.shared_state not in shared)
        shared.add(mixer.shared_state)
        total = _add(total, count, mixer.cost, states)
    return ModelCost(total, rows * config.dim, strict)


def _add(total: Cost, times: int, cost: Cost, states: int | None = None) -> Cost:
    """total + times x cost; states: how many of the states are held, unless all."""
    return Cost(
        total.parameters + times * cost.parameters,
        total.flops + times * cost.flops,
        total.pairs + times * cost.pairs,
        total.state_bytes + (times if states is None else states) * cost.state_bytes,
    )


def paper_flops(config: ModelConfig, length: int) -> float:
    """Forward FLOPs of one sequence as section 3.2 of MoSA counts them (Piekos et al. 2025, arXiv 2505.00315).

    No causal halving, no vocabulary; of a head of width e in a model of width d: dense 8deT + 4eT^2, MoSA with k kept
    8dek + 4ek^2 + 2dT + ek. ValueError for any other mixer.
    """
    flops = config.layers * 2.0 * length * MATRICES_OF_FFN[config.ffn] * config.dim * config.hidden
    for names in pattern_of(config):
        flops += sum(_paper_mixer(config, name, length) for name in names)
    return flops


def _paper_mixer(config: ModelConfig, name: str, length: int) -> float:
    settings = config.mixers[name]
    heads, kind, dim = settings.get("heads", 1), settings["kind"], config.dim
    if kind == "dense" and settings["kv_heads"] in (None, heads):
        width = settings["head_dim"] or dim // heads
        return heads * (8 * dim * width * length + 4 * width * length**2)
    if kind == "mosa":
        width, kept = min(settings["head_dim"], dim), min(settings["keep"], length)
        return heads * (8 * dim * width * kept + 4 * width * kept**2 + 2 * dim * length + width * kept)
    raise ValueError(f"model.mixers.{name}: the paper counts dense (one key head for each) and mosa, not this {kind}")


@dataclass(frozen=True)
class _MixerCost:
    cost: Cost
    strict: bool
    shared_state: str | None


class _NoNumbers(TorchFunctionMode):
    """While entered nothing is drawn nor scaled: the meta device knows such operations only in Python, and the imports
    alone that they need take as long as planning a thousand runs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Initialisers and scaling leave their tensor as it is; what would be random is empty."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in UNCHANGED or (func in SCALED and isinstance(args[1], int | float)):
            return args[0]
        return (torch.empty if func in (torch.randn, torch.rand) else func)(*args, **kwargs)


UNCHANGED = (torch.Tensor.normal_, torch.Tensor.uniform_)
SCALED = (torch.Tensor.mul, torch.Tensor.mul_, torch.Tensor.__mul__, torch.Tensor.__rmul__)

Settings = tuple[tuple[str, Any], ...]


def _frozen(settings: dict[str, Any]) -> Settings:
    return tuple(sorted(settings.items()))


@functools.lru_cache(maxsize=1 << 16)
def _mixer(dim: int, frozen: Settings, length: int) -> _MixerCost:
    settings = dict(frozen)
    with torch.device("meta"), _NoNumbers():
        mixer = build(settings.pop("kind"), dim, **settings)
    return _MixerCost(mixer.cost(length), mixer.causality == "strict", mixer.shared_state)
