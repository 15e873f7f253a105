"""What is measured: whole mixers, and the attention inside them, each beside its baseline.

Baselines: of a mixer, `dense` with as many heads of the same width; of its attention, torch's own causal attention
(SDPA) with those heads. On a GPU, FlexAttention with the same predicate stands beside them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.lifetimes import Lifetimes, living_pairs
from attention.mixer import MIXERS, Context, Mixer, build
from attention.ops.attend import attend
from parallel.engine import autocast

Part = Literal["mixer", "attention"]
PARTS: tuple[Part, ...] = ("mixer", "attention")
HEAD_DIM = 64  # of the baseline of a mixer that has no heads


class Bed:
    """Where all is measured, and in what precision: mixers under autocast from float32, as in training; attention in
    `dtype`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._inputs: dict[tuple[int, ...], Tensor] = {}

    def random(self, *shape: int, index: int = 0) -> Tensor:
        """Fixed normal numbers of float32; the same shape and index give the same tensor, until `clear`."""
        key = (index, *shape)
        if key not in self._inputs:
            generator = torch.Generator(self.device).manual_seed(index)
            self._inputs[key] = torch.randn(shape, generator=generator, device=self.device)
        return self._inputs[key]

    def clear(self) -> None:
        """Let the inputs of one length go."""
        self._inputs.clear()


@dataclass(frozen=True)
class Passes:
    """A subject at one length, ready to run: `forward` alone without gradients, and `both`, forward and backward.

    block_mask_seconds: what FlexAttention's mask took beforehand.
    """

    forward: Callable[[], None]
    both: Callable[[], None]
    block_mask_seconds: float | None = None


class Subject(ABC):
    """Something to measure; `baseline` is the name of another subject of the same part, None for baselines."""

    part: Part

    def __init__(self, name: str, baseline: str | None) -> None:
        self.name = name
        self.baseline = baseline

    @abstractmethod
    def pairs(self, length: int) -> float:
        """(query, living key) pairs of one sequence, over query heads."""

    @abstractmethod
    def passes(self, length: int) -> Passes:
        """What to run on one sequence of `length` tokens."""


class WholeMixer(Subject):
    """x to y with all projections, gradients of x and of the weights; auxiliary losses included."""

    part = "mixer"

    def __init__(self, name: str, baseline: str | None, mixer: Mixer, dim: int, on: Bed) -> None:
        super().__init__(name, baseline)
        self.mixer = mixer.to(on.device)
        self.dim = dim
        self.on = on

    def pairs(self, length: int) -> float:
        return self.mixer.cost(length).pairs

    def passes(self, length: int) -> Passes:
        mixer, on = self.mixer, self.on
        x = on.random(1, length, self.dim).detach().requires_grad_()
        dy = on.random(1, length, self.dim, index=1)

        def mixed() -> tuple[Tensor, dict[str, Tensor]]:
            with autocast(on.device, on.dtype):
                return mixer(x, Context(initial=x, residual=x))

        def forward() -> None:
            mixer.eval()
            with torch.no_grad():
                mixed()

        def both() -> None:
            mixer.train()
            y, losses = mixed()
            torch.autograd.backward([y, *losses.values()], [dy.to(y.dtype), *(None for _ in losses)])
            # Nothing of this pass is left for the next one.
            mixer.after_step(skipped=True)
            mixer.zero_grad()
            x.grad = None

        return Passes(forward, both)


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads and their width; as text 8x64, or 8/2x64 where key heads are shared."""

    heads: int
    kv_heads: int
    width: int

    def __str__(self) -> str:
        shared = f"/{self.kv_heads}" if self.kv_heads < self.heads else ""
        return f"{self.heads}{shared}x{self.width}"


Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(Subject):
    """Attention alone: out from q, k, v that are given, and their gradients."""

    part = "attention"

    def __init__(self, name: str, baseline: str | None, heads: Heads, on: Bed) -> None:
        super().__init__(name, baseline)
        self.heads = heads
        self.on = on

    @abstractmethod
    def prepare(self, length: int) -> tuple[Call, int, float | None]:
        """What maps q, k, v to out; the number of keys; seconds that a block mask took, if there is one."""

    def passes(self, length: int) -> Passes:
        heads, on = self.heads, self.on
        call, num_keys, seconds = self.prepare(length)
        queries, keys = (heads.heads, length, heads.width), (heads.kv_heads, num_keys, heads.width)
        q, k, v = (
            on.random(1, *shape, index=index).to(on.dtype).detach().requires_grad_()
            for index, shape in enumerate((queries, keys, keys))
        )
        dout = on.random(1, *queries, index=3).to(on.dtype)

        def forward() -> None:
            with torch.no_grad():
                call(q, k, v)

        def both() -> None:
            torch.autograd.grad(call(q, k, v), (q, k, v), dout)

        return Passes(forward, both, seconds)


class Sdpa(Attention):
    """torch's causal `scaled_dot_product_attention`."""

    def pairs(self, length: int) -> float:
        return self.heads.heads * length * (length + 1) / 2

    def prepare(self, length: int) -> tuple[Call, int, float | None]:
        grouped = self.heads.kv_heads < self.heads.heads
        call = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)
        return call, length, None


Pattern = Callable[[int], Lifetimes]


class Attend(Attention):
    """`attend` over the keys of a mixer, as long as they live."""

    def __init__(self, name: str, baseline: str | None, heads: Heads, on: Bed, pattern: Pattern) -> None:
        super().__init__(name, baseline, heads, on)
        self.pattern = pattern

    def pairs(self, length: int) -> float:
        life = self.pattern(length)
        heads = {"heads": self.heads.heads, "kv_heads": self.heads.kv_heads}
        return living_pairs(life, None, batch=1, num_queries=length, num_keys=num_keys(life), **heads)

    def prepare(self, length: int) -> tuple[Call, int, float | None]:
        life = self._life(length)
        return lambda q, k, v: attend(q, k, v, life)[0], num_keys(life), None

    def _life(self, length: int) -> Lifetimes:
        life = self.pattern(length)
        kinds = None if life.generation is None else life.generation.to(self.on.device)
        return Lifetimes(life.birth.to(self.on.device), life.death.to(self.on.device), kinds)


class Flex(Attend):
    """FlexAttention, compiled, over the same keys. Raises UnavailableError where it does not compile."""

    def passes(self, length: int) -> Passes:
        try:
            passes = super().passes(length)
            passes.both()  # compiles
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may say: a peer that fails must not end the bench
            raise UnavailableError(
                f"FlexAttention: {next(iter(str(error).splitlines()), type(error).__name__)}"
            ) from error
        return passes

    def prepare(self, length: int) -> tuple[Call, int, float | None]:
        from lmtrain.bench.flex import flex_call  # imports the compiler

        life = self._life(length)
        call, seconds = flex_call(life, length, self.heads.heads, self.heads.kv_heads)
        return call, num_keys(life), seconds


class UnavailableError(RuntimeError):
    """A peer that does not run here."""


def num_keys(life: Lifetimes) -> int:
    """Keys per head."""
    return max(life.birth.shape[-1], life.death.shape[-1])


def make_subjects(mixers: dict[str, dict[str, Any]], dim: int, on: Bed) -> list[Subject]:
    """Of each mixer (name -> kind and settings): itself, its attention where it has a `pattern`, and baselines.

    Baselines come first. A `dense` among the mixers is the baseline of those with as many heads as it has.
    """
    heads = {name: heads_of(settings, dim) for name, settings in mixers.items()}
    dense = {heads[name]: name for name in reversed(mixers) if mixers[name]["kind"] == "dense"}
    baselines: dict[str, Subject] = {}
    subjects: list[Subject] = []
    for name, shape in heads.items():
        kind, settings = _split(mixers[name])
        mixer = build(kind, dim, **settings)
        if dense.get(shape) == name:
            baselines[name] = WholeMixer(name, None, mixer, dim, on)
        else:
            if shape not in dense:
                dense[shape] = f"dense {shape}"
                baselines[dense[shape]] = WholeMixer(dense[shape], None, _dense(shape, dim), dim, on)
            subjects.append(WholeMixer(name, dense[shape], mixer, dim, on))
        if (pattern := pattern_of(mixer)) is not None:
            sdpa = f"SDPA {shape}"
            baselines.setdefault(sdpa, Sdpa(sdpa, None, shape, on))
            subjects.append(Attend(name, sdpa, shape, on, pattern))
            if on.device.type == "cuda":
                subjects.append(Flex(f"{name} (flex)", sdpa, shape, on, pattern))
    return [*baselines.values(), *subjects]


def heads_of(mixer: dict[str, Any], dim: int) -> Heads:
    """The heads of a mixer, from its kind and settings; for one without, as many of the usual width as fit."""
    kind, settings = _split(mixer)
    config = MIXERS[kind].Config(**settings)
    heads = getattr(config, "heads", None)
    if heads is None:
        return Heads(max(1, dim // HEAD_DIM), max(1, dim // HEAD_DIM), HEAD_DIM)
    return Heads(heads, getattr(config, "kv_heads", None) or heads, config.head_dim or dim // heads)


def _split(mixer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and settings."""
    return mixer["kind"], {key: value for key, value in mixer.items() if key != "kind"}


def pattern_of(mixer: Mixer) -> Pattern | None:
    """The mixer's lifetimes by length, if its attention is one call of `attend` over keys that do not depend on x."""
    pattern: Pattern | None = getattr(mixer, "pattern", None)
    if not callable(pattern):
        return None
    try:
        pattern(1)
    except ValueError:  # these settings have none
        return None
    return pattern


def _dense(shape: Heads, dim: int) -> Mixer:
    rotary = {"rotary": 0.0} if shape.width % 2 else {}
    return build("dense", dim, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.width, **rotary)
