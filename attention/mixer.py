"""The contract of a sequence mixer, and the registry of all of them.

A mixer maps x [B, T, d] to y [B, T, d], position by position, and may look only backwards. A new one is one
file in this folder: a class with `@register(name)` and a dataclass `Config`. Nothing else has to know of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.shard import Shard

Causality = Literal["strict", "selects_ahead"]


@dataclass
class Context:
    """What a mixer may know about its tokens besides their vectors. Every field is optional.

    positions: int [B, T], counted from the start of each token's document.
    document_ends: int [B, T], for each token the index in this row one past its document's last token;
        T or more: the document goes on in the next segment.
    initial, residual: [B, T, d], of the new tokens only: the embedding output, and the residual stream before
        the norm.
    training: overrides the module's own training flag.
    statistics: where mixers leave numbers worth watching (`report`); None: nobody watches.
    debug: raise where a number that is not finite arises (`attention.debug.check_finite`).
    place: where in the model this is: the layer, and the mixer's name in the pattern.
    shard: the tokens are one process's slice of the row; all fields are of these tokens alone. document_ends count
        from the first of them, and may lie beyond the last; positions, as always, from the start of the document.
    """

    positions: Tensor | None = None
    document_ends: Tensor | None = None
    initial: Tensor | None = None
    residual: Tensor | None = None
    training: bool | None = None
    statistics: dict[Any, Any] | None = None
    debug: bool = False
    place: tuple[Any, ...] = ()
    shard: Shard | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Values that every layer of one forward pass would compute alike (clock, rotary table)."""

    def of_layer(self, residual: Tensor) -> Context:
        """The same context with the residual stream of one layer."""
        return dataclasses.replace(self, residual=residual)

    def watching(self, part: Any) -> Context:
        """The same context inside one part (a layer, a mixer), which has a place of its own for its statistics."""
        if self.statistics is None and not self.debug:
            return self
        statistics = None if self.statistics is None else self.statistics.setdefault(part, {})
        return dataclasses.replace(self, statistics=statistics, place=(*self.place, part))


class MixerOutput(typing.NamedTuple):
    """y [B, T, d]; auxiliary losses by name, scalars, already weighted."""

    y: Tensor
    losses: dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """What one sequence of T tokens costs in a forward pass.

    parameters: numbers; flops: 2 per multiply-add; pairs: (query, living key) pairs, summed over query heads;
    state_bytes: what decoding holds after T tokens.
    """

    parameters: int
    flops: float
    pairs: float
    state_bytes: float

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


class State(typing.Protocol):
    """What a mixer remembers of the tokens it has seen: living keys and scan states, nothing else.

    bytes: of the living rows of all sequences (`Cost.state_bytes`: of one); capacity: as allocated.
    """

    @property
    def bytes(self) -> int: ...
    @property
    def capacity(self) -> int: ...


class Mixer(nn.Module):
    """A sequence mixer over vectors of `dim`; subclasses are made by `build` from their `Config`."""

    Config: ClassVar[type[Any]]
    causality: Causality = "strict"
    sequence_parallel: str | None = None
    """What crosses between the ranks that share a row (`Context.shard`), in a few words; None: it takes no shard."""
    shared_state: str | None = None
    """Mixers of one model with the same name here keep one state among them, which the model counts once: the first
    one's `init_state` makes it, and its `of_another_layer()` is the state of each other one."""

    @classmethod
    def of(cls, dim: int, config: Any) -> Mixer:
        """The mixer that `config` describes: one of this class, unless its settings choose between several."""
        return cls(dim, config)

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context | None = None, state: Any = None) -> MixerOutput:
        """Mix x [B, T, d]. Without `ctx`: one unpacked document per row, starting at position 0.

        With `state` the tokens go on from those it has seen; it is updated in place, and gradients do not
        flow into it. Prefill, decoding token by token, carrying a state across segments are this same call.

        With `ctx.shard` they go on from those of the lower ranks, and gradients flow there: each rank's backward pass
        of its own loss gives the gradients of x of its tokens, whatever rank's loss they are due to, and of the
        parameters a part; the parts sum up to those of one process. So do the losses, each times its rank's share of
        the tokens. All ranks call forward and backward, of the same layers in the same order.
        """

    @abstractmethod
    def init_state(self, batch: int, limit: int | None = None) -> Any:
        """An empty state for `batch` sequences.

        With a `limit` no key in it outlives that many tokens, whatever the mixer's own rule: so a state
        carried along an endless stream stays bounded where keys would live for ever.
        """

    @abstractmethod
    def cost(self, length: int) -> Cost:
        """The cost of one sequence of `length` tokens, from the definition of the mixer alone."""

    def check_shard(self, ctx: Context | None) -> None:
        """ValueError for a shard that this mixer does not take."""
        if ctx is not None and ctx.shard is not None and self.sequence_parallel is None:
            raise ValueError(
                f"{type(self).__name__} cannot share a sequence among ranks: set parallel.sequence 1, or another mixer"
            )

    def in_training(self, ctx: Context | None) -> bool:
        """Whether a forward pass trains: what the context says, else the module's own flag."""
        return self.training if ctx is None or ctx.training is None else ctx.training

    def pending(self) -> list[Tensor]:
        """What `after_step` learns from: sums over the tokens of a step, in buffers of the name `pending`.

        Processes that train together add theirs up before it, so that all learn the same.
        """
        return [buffer for name, buffer in self.named_buffers() if name.rpartition(".")[2] == "pending"]

    def after_step(self, skipped: bool = False) -> None:
        """Move what is learnt online (centroids, codebooks), once per optimizer step; `skipped`: drop it."""


MIXERS: dict[str, type[Mixer]] = {}


def register(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a mixer known as `kind: name`."""

    def add(cls: type[Mixer]) -> type[Mixer]:
        assert name not in MIXERS, f"two mixers are called {name}"
        assert dataclasses.is_dataclass(cls.Config), f"{cls.__name__}.Config must be a dataclass"
        MIXERS[name] = cls
        return cls

    return add


def build(name: str, dim: int, **settings: Any) -> Mixer:
    """A ready mixer. Raises ValueError with every problem of the settings at once."""
    config, problems = read_settings(name, dim, settings)
    if problems:
        raise ValueError("; ".join(message for _, message in problems))
    return MIXERS[name].of(dim, config)


def read_settings(name: str, dim: int, settings: dict[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    """The mixer's `Config` filled from `settings`, and every problem found as (setting, message)."""
    if name not in MIXERS:
        near = nearest(name, list(MIXERS))
        return None, [("kind", f"no such mixer: {name}{near} ({', '.join(sorted(MIXERS))})")]
    fields = {f.name: f for f in dataclasses.fields(MIXERS[name].Config)}
    hints = typing.get_type_hints(MIXERS[name].Config)
    problems = []
    for key, value in settings.items():
        if key not in fields:
            names = ", ".join(fields)
            problems.append((key, f"no such setting of {name}{nearest(key, list(fields))} ({names})"))
        elif not _fits(value, hints[key]):
            problems.append((key, f"{key} must be {type_in_words(hints[key])}, got {value!r}"))
        else:
            problems += [(key, message) for message in _range_problems(fields[key], value)]
    if problems:
        return None, problems
    config = MIXERS[name].Config(**settings)
    return config, config.problems(dim)


def setting(default: Any, meaning: str, *, at_least: float | None = None, below: float | None = None) -> Any:
    """A field of a mixer's `Config`: its default, what it means, and its range."""
    return field(default=default, metadata={"meaning": meaning, "at_least": at_least, "below": below})


def nearest(word: str, words: list[str]) -> str:
    """`; did you mean x?` for the closest of the words, or nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def type_in_words(hint: Any) -> str:
    """A type hint as a person would say it: `a whole number`, `fixed or strided`, `a number or null`."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, types.UnionType):
        return " or ".join(type_in_words(part) for part in typing.get_args(hint))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words[hint]


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _range_problems(of: dataclasses.Field[Any], value: Any) -> list[str]:
    if value is None or isinstance(value, bool | str):
        return []
    least, below = of.metadata.get("at_least"), of.metadata.get("below")
    if least is not None and value < least:
        return [f"{of.name} must be >= {least}, got {value}"]
    if below is not None and value >= below:
        return [f"{of.name} must be < {below}, got {value}"]
    return []


def report(ctx: Context | None, numbers: Callable[[], dict[str, Tensor]]) -> None:
    """Leave numbers worth watching, scalars by name, with whoever asked for them; computed only then."""
    if ctx is not None and ctx.statistics is not None:
        with torch.no_grad():
            ctx.statistics.update(numbers())


def residual_output(parameter: Tensor) -> Tensor:
    """Tag a matrix that writes to the residual stream: the model scales its init by (2 layers)^-1/2."""
    parameter.residual_output = True  # type: ignore[attr-defined]
    return parameter


def no_weight_decay(parameter: Tensor) -> Tensor:
    """Tag a parameter that weight decay must leave alone (routers, gates; vectors are left alone anyway)."""
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def init_fan_in(linear: nn.Linear) -> nn.Linear:
    """Draw the weight from N(0, 1 / fan_in)."""
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return linear


def parameter_count(module: nn.Module) -> int:
    """Numbers in the module's parameters; works on the meta device."""
    return sum(p.numel() for p in module.parameters())


def floating(x: Tensor) -> torch.dtype:
    """At least float32: the dtype of islands that must not be rounded to 16 bits."""
    return torch.promote_types(x.dtype, torch.float32)


class WideModule(nn.Module):
    """A module whose parameters and buffers stay float32 or wider, whatever it is cast to together with others."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WideModule:
        """`to`, `cuda`, `bfloat16`, ..: of the casts only those to float32 and wider."""

        def kept_wide(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == floating(moved) else x.to(moved.device)

        return super()._apply(kept_wide, recurse)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in at least float32, also under autocast: for what decides (routers, scores, clusters)."""
    wide = floating(x)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(wide), weight.to(wide))
