"""How much memory each of several ranks takes, and the smallest setting that fits: estimated, no weights are made.

What ranks hold of weights, gradients and moments follows from the engine, n ranks and p numbers of 4 bytes:

    engine     weights    masters   gradients   moments
    torch      4p         -         4p          8p
    ZeRO 1     4p         4p/n      4p          8p/n
    ZeRO 2     4p         4p/n      4p/n        8p/n
    ZeRO 3     4p/n       4p/n      4p/n        8p/n      and whole for a while: all weights, at most LIVE_PARAMETERS

(the masters are the weights that the optimizer moves). Gradients travel through a buffer. Activations and logits are
those of the micro-batch's tokens on this rank (`lmtrain.memory`). Not counted: keys that come from ranks which share
the sequence, and what a library or an allocator keeps for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from attention.divisors import divisors
from attention.mixer import parameter_count
from lmtrain.config import Config
from lmtrain.memory import FLOAT32, estimate_passing, nbytes
from lmtrain.model import DecoderLM
from lmtrain.optimizer import build_optimizer
from parallel.deepspeed_settings import LIVE_PARAMETERS, REDUCE_BUCKET
from parallel.world import MESSAGE_BYTES

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Layout:
    """How a step is shared out. zero: stage of ZeRO, 0 = the torch engine; sequence: ranks that share a row."""

    world: int
    sequence: int
    zero: int
    micro_batch: int
    checkpointing: bool
    offload: bool = False

    def in_words(self) -> str:
        """For people."""
        engine = f"ZeRO {self.zero}" + (" with offload" if self.offload else "") if self.zero else "the torch engine"
        rows = f"micro-batches of {self.micro_batch}" + (f" / {self.sequence} ranks" if self.sequence > 1 else "")
        recomputed = ", activation checkpointing" if self.checkpointing else ""
        return f"{self.world} ranks, {engine}, {rows}{recomputed}"

    def overrides(self) -> list[str]:
        """The settings that make it so, as `key=value`."""
        engine = (
            ["parallel.engine=torch"]
            if not self.zero
            else ["parallel.engine=deepspeed", f"parallel.zero={self.zero}"]
            + (["parallel.offload=true"] if self.offload else [])
        )
        sequence = [f"parallel.sequence={self.sequence}"] if self.sequence > 1 else []
        checkpointing = f"train.activation_checkpointing={'true' if self.checkpointing else 'false'}"
        return [*engine, *sequence, f"train.micro_batch={self.micro_batch}", checkpointing]


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of one rank at the peak of a step. host: what lies in the memory of the CPU instead."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    gathered: int
    buffers: int
    activations: int
    logits: int
    total: int
    host: int


def layout_of(config: Config, world: int = 1, sequence: int = 1, zero: int | None = None) -> Layout:
    """That of `config` on `world` ranks. ValueError if these do not share a batch evenly."""
    if world % sequence:
        raise ValueError(f"--sequence {sequence}: does not divide the {world} ranks of --world")
    share, rest = divmod(config.batch_sequences, world // sequence)
    if rest or not share:
        fitting = ", ".join(str(sequence * number) for number in divisors(config.batch_sequences))
        raise ValueError(
            f"--world {world}: the {config.batch_sequences} sequences of a step (train.batch_tokens / data.seq_len) "
            f"cannot be shared by {world // sequence}; possible: {fitting}"
        )
    if zero is None:
        zero = config.parallel.zero if config.parallel.engine == "deepspeed" else 0
    return Layout(
        world=world,
        sequence=sequence,
        zero=zero,
        micro_batch=min(share, config.micro_batch(world // sequence)),
        checkpointing=config.train.activation_checkpointing,
        offload=config.parallel.offload and zero > 0,
    )


def rank_memory(config: Config, model: DecoderLM, layout: Layout) -> RankMemory:
    """Of one rank that trains `model`, which may lie on the meta device."""
    whole = nbytes(model.parameters())
    part = -(-whole // layout.world)
    moments = nbytes(build_optimizer(model, config.optimizer).state().values())
    zero = layout.zero
    held = {
        "weights": part if zero == 3 else whole,
        "masters": part if zero else 0,
        "gradients": part if zero >= 2 else whole,
        "optimizer": -(-moments // layout.world) if zero else moments,
    }
    moved = ("masters", "optimizer", *(["gradients"] if zero >= 2 else []), *(["weights"] if zero == 3 else []))
    host = sum(held.pop(name) for name in moved) if layout.offload else 0
    tokens = -(-layout.micro_batch * config.data.seq_len // layout.sequence)
    passing = estimate_passing(config, model, tokens)
    gathered, buffers = _whole_for_a_while(config, model, zero), _buffers(config, model, layout)
    return RankMemory(
        **{name: held.get(name, 0) for name in ("weights", "masters", "gradients", "optimizer")},
        gathered=gathered,
        buffers=buffers,
        activations=passing.activations_checkpointed if layout.checkpointing else passing.activations,
        logits=passing.logits,
        total=sum(held.values()) + gathered + buffers + passing.peak(layout.checkpointing),
        host=host,
    )


def smallest_fit(
    config: Config, model: DecoderLM, memory: int, sequence: int = 1, world: int | None = None, zero: int | None = None
) -> Layout | None:
    """The layout of fewest ranks whose estimate is at most `memory` bytes a rank; None if none is.

    On as many ranks the first of these: torch, then ZeRO 1, 2, 3, each with the largest micro-batch that fits; and only
    then activation checkpointing. A given world or zero is kept.
    """
    for layout in _layouts(config, sequence, world, zero):
        if rank_memory(config, model, layout).total <= memory:
            return layout
    return None


def _layouts(config: Config, sequence: int, world: int | None, zero: int | None) -> Iterator[Layout]:
    worlds = [world] if world else [sequence * number for number in divisors(config.batch_sequences)]
    engines = [zero] if zero is not None else [0, 1, 2, 3]
    for ranks in worlds:
        first = layout_of(config, ranks, sequence, 0)
        for checkpointing in sorted({config.train.activation_checkpointing, True}):
            for engine in engines:
                if engine and config.optimizer.kind == "muon":
                    continue
                for micro_batch in reversed(divisors(first.micro_batch)):
                    offload = config.parallel.offload and engine > 0
                    yield replace(
                        first, zero=engine, micro_batch=micro_batch, checkpointing=checkpointing, offload=offload
                    )


def _whole_for_a_while(config: Config, model: DecoderLM, zero: int) -> int:
    """Weights that stage 3 has together: it keeps those that it needs again before so many others."""
    if zero < 3:
        return 0
    given = config.parallel.deepspeed.get("zero_optimization", {})
    kept = min(int(given.get(f"stage3_max_{name}", LIVE_PARAMETERS)) for name in ("live_parameters", "reuse_distance"))
    largest = max(parameter_count(block) for block in model.layers)
    return FLOAT32 * min(parameter_count(model), max(largest, kept))


def _buffers(config: Config, model: DecoderLM, layout: Layout) -> int:
    """What gradients travel through; with torch also a tensor that is larger than its messages."""
    if layout.zero:
        given = config.parallel.deepspeed.get("zero_optimization", {})
        return FLOAT32 * int(given.get("reduce_bucket_size", min(REDUCE_BUCKET, parameter_count(model))))
    if layout.world == 1:
        return 0
    largest = max(FLOAT32 * p.numel() for p in model.parameters())
    return min(nbytes(model.parameters()), max(MESSAGE_BYTES, largest))


def bytes_of(text: str) -> int:
    """`80GB` (10^9), `24GiB` (2^30), `512M`, `1000`. ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no size of a memory; write 80GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])
