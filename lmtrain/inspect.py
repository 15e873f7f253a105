"""What a model costs before it is made: parameters, work, memory, by part. And what each mixer costs.

All lies on the meta device, which has shapes but no numbers: a model of any size is inspected at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import yaml

from attention.mixer import MIXERS, Cost, build, parameter_count
from lmtrain.config import Config, to_dict
from lmtrain.memory import Memory, estimate_memory, nbytes
from lmtrain.model import DecoderLM
from lmtrain.rank_memory import Layout, RankMemory, layout_of, rank_memory, smallest_fit
from lmtrain.table import table


@dataclass(frozen=True)
class Part:
    """A part of the model and its cost for one sequence of seq_len tokens; layer None: outside of them."""

    layer: int | None
    name: str
    kind: str
    cost: Cost


@dataclass(frozen=True)
class Asked:
    """What `inspect` is asked about several ranks. zero: None = as configured, 0 = torch; memory: bytes."""

    world: int | None = None
    sequence: int = 1
    zero: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Ranks:
    """A layout, and what it takes on each rank; the smallest that fits, if a memory was given and one does."""

    layout: Layout
    memory: RankMemory
    limit: int | None = None
    fitting: tuple[Layout, RankMemory] | None = None

    def to_json(self) -> dict[str, Any]:
        """For machines: bytes."""
        found: dict[str, Any] = {"layout": dataclasses.asdict(self.layout)}
        found["memory_bytes"] = dataclasses.asdict(self.memory)
        if self.limit is not None:
            found["limit_bytes"] = self.limit
            found["smallest"] = None
        if self.fitting is not None:
            layout, memory = self.fitting
            found["smallest"] = {"layout": dataclasses.asdict(layout), "memory_bytes": dataclasses.asdict(memory)}
        return found

    def format(self) -> str:
        """For people."""
        rows = [
            ("weights", self.memory.weights, "float32"),
            ("masters", self.memory.masters, "the weights that the optimizer moves"),
            ("gradients", self.memory.gradients, "float32"),
            ("optimizer", self.memory.optimizer, "moments"),
            ("gathered", self.memory.gathered, "weights in parts, whole for a while"),
            ("buffers", self.memory.buffers, "through which gradients travel"),
            ("activations", self.memory.activations, "of a micro-batch (estimate)"),
            ("logits", self.memory.logits, "the loss and what it keeps"),
            ("total", self.memory.total, "peak of a step"),
            ("host", self.memory.host, "offloaded to the memory of the CPU"),
        ]
        head = ["memory of each rank", "bytes", self.layout.in_words()]
        shown = table(head, [[name, f"{number:,}", what] for name, number, what in rows])
        return shown if self.limit is None else f"{shown}\n\n{self._verdict(self.limit)}"

    def _verdict(self, limit: int) -> str:
        if self.fitting is None:
            return (
                f"nothing fits {limit:,} bytes a rank; try more ranks, --sequence, or a model or data.seq_len smaller"
            )
        layout, memory = self.fitting
        return (
            f"smallest that fits {limit:,} bytes a rank: {layout.in_words()} ({memory.total:,} bytes)\n"
            f"  {' '.join(layout.overrides())}"
        )


@dataclass(frozen=True)
class Inspection:
    """Parts in the order of the forward pass, their sum, and memory in bytes; `ranks` if these were asked about."""

    config: dict[str, Any]
    length: int
    causality: str
    parts: list[Part]
    total: Cost
    memory: Memory
    micro_batch: int
    checkpoint_bytes: int
    note: str
    ranks: Ranks | None = None

    def to_json(self) -> dict[str, Any]:
        """For machines: work is per token, memory in bytes."""
        by_kind: dict[str, int] = {}
        for part in self.parts:
            by_kind[part.kind] = by_kind.get(part.kind, 0) + part.cost.parameters
        return {
            "config": self.config,
            "seq_len": self.length,
            "causality": self.causality,
            "parameters": self.total.parameters,
            "parameters_by_part": by_kind,
            "flops_per_token": {"forward": self._forward, "training": 3 * self._forward},
            "pairs_per_token": self.total.pairs / self.length,
            "state_bytes": self.total.state_bytes,
            "parts": [
                {
                    "layer": part.layer,
                    "name": part.name,
                    "kind": part.kind,
                    **_per_token(part.cost, self.length),
                }
                for part in self.parts
            ],
            "micro_batch": self.micro_batch,
            "memory_bytes": {**dataclasses.asdict(self.memory), "state": self.total.state_bytes},
            "checkpoint_bytes": self.checkpoint_bytes,
            "note": self.note,
            **({"ranks": self.ranks.to_json()} if self.ranks is not None else {}),
        }

    @property
    def _forward(self) -> float:
        return self.total.flops / self.length

    def format(self) -> str:
        """For people: the filled configuration, then tables; equal neighbouring layers share a line."""
        blocks = [
            yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True).rstrip(),
            table(["part", "kind", *_UNITS], [*self._lines(), ["total", "", *_cells(self.total, self.length)]]),
            f"training: {3 * self._forward:,.0f} FLOPs per token (3 x forward); causality: {self.causality}",
            table(["memory", "bytes", "what"], self._memory_lines()),
        ]
        if self.ranks is not None:
            blocks.append(self.ranks.format())
        return "\n\n".join([*blocks, self.note] if self.note else blocks)

    def _lines(self) -> list[list[str]]:
        layers = [list(p) for _, p in groupby(self.parts, key=lambda p: p.name if p.layer is None else p.layer)]
        lines = []
        for _, equal in groupby(layers, key=lambda parts: [(p.name, p.cost) for p in parts]):
            same = list(equal)
            where = _where(same[0][0].layer, same[-1][0].layer)
            lines += [[f"{where}{p.name}", p.kind, *_cells(p.cost, self.length)] for p in same[0]]
        return lines

    def _memory_lines(self) -> list[list[str]]:
        memory = self.memory
        batch = f"a micro-batch of {self.micro_batch} x {self.length} tokens (estimate)"
        rows = [
            ("weights", memory.weights, "float32"),
            ("gradients", memory.gradients, "float32"),
            ("optimizer", memory.optimizer, "moments"),
            ("activations", memory.activations, batch),
            ("... checkpointed", memory.activations_checkpointed, "with train.activation_checkpointing"),
            ("logits", memory.logits, "the loss and what it keeps"),
            ("training", memory.training, "peak of a step, as configured"),
            ("decode state", self.total.state_bytes, f"one sequence of {self.length} tokens"),
            ("checkpoint", self.checkpoint_bytes, "on the disk, each"),
        ]
        return [[name, f"{number:,.0f}", what] for name, number, what in rows]


_UNITS = ["parameters", "FLOPs/token", "pairs/token", "state bytes"]


def _per_token(cost: Cost, length: int) -> dict[str, float]:
    return {
        "parameters": cost.parameters,
        "flops_per_token": cost.flops / length,
        "pairs_per_token": cost.pairs / length,
        "state_bytes": cost.state_bytes,
    }


def _cells(cost: Cost, length: int) -> list[str]:
    return [f"{number:,.0f}" for number in _per_token(cost, length).values()]


def _where(first: int | None, last: int | None) -> str:
    if first is None:
        return ""
    return f"layer {first} " if first == last else f"layers {first}-{last} each "


def inspect(config: Config, asked: Asked | None = None) -> Inspection:
    """The cost of what `config` describes, and if asked on several ranks. No weights are made, no text is read.

    ValueError if the ranks asked about cannot share the work.
    """
    note = ""
    if config.model.vocab_size is None:
        assumed = config.assumed_vocabulary
        note = f"model.vocab_size is not known before the text is read: {assumed} is assumed here"
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=assumed))
    with torch.device("meta"):
        model = DecoderLM(config.model)
    parts, memory = _parts(config, model), estimate_memory(config, model)
    return Inspection(
        config=to_dict(config),
        length=config.data.seq_len,
        causality=model.causality,
        parts=parts,
        total=sum((part.cost for part in parts), Cost(0, 0, 0, 0)),
        memory=memory,
        micro_batch=config.micro_batch(),
        checkpoint_bytes=nbytes(model.state_dict().values()) + memory.optimizer,
        note=note,
        ranks=_ranks(config, model, asked) if asked is not None else None,
    )


def _ranks(config: Config, model: DecoderLM, asked: Asked) -> Ranks:
    layout = layout_of(config, asked.world or asked.sequence, asked.sequence, asked.zero)
    fitting = None
    if asked.memory is not None:
        found = smallest_fit(config, model, asked.memory, asked.sequence, asked.world, asked.zero)
        fitting = (found, rank_memory(config, model, found)) if found is not None else None
    return Ranks(layout, rank_memory(config, model, layout), asked.memory, fitting)


def _parts(config: Config, model: DecoderLM) -> list[Part]:
    """Every part once; their costs add up to the model's."""
    length, vocabulary, dim = config.data.seq_len, model.embedding.num_embeddings, config.model.dim
    norm = parameter_count(model.norm)
    parts = [Part(None, "embedding", "embedding", Cost(vocabulary * dim, 0, 0, 0))]
    if model.positions is not None:
        parts.append(Part(None, "positions", "embedding", Cost(parameter_count(model.positions), 0, 0, 0)))
    for layer, costs in enumerate(model.layer_costs(length)):
        for name, cost in costs.items():
            kind = "feed-forward" if name == "ffn" else config.model.mixers[name]["kind"]
            parts.append(Part(layer, name, kind, cost))
        parts.append(Part(layer, "norms", "norm", Cost(2 * norm, 0, 0, 0)))
    parts.append(Part(None, "norm", "norm", Cost(norm, 0, 0, 0)))
    head = 0 if config.model.tied else vocabulary * dim
    parts.append(Part(None, "head", "head", Cost(head, 2 * length * vocabulary * dim, 0, 0)))
    return parts


@dataclass(frozen=True)
class MixerRow:
    """A registered mixer in its default settings: what it is, and its cost per token and query head."""

    name: str
    idea: str
    causality: str
    pairs: float
    state_bytes: float


@dataclass(frozen=True)
class MixerList:
    """All registered mixers at one length."""

    length: int
    rows: list[MixerRow]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {"length": self.length, "mixers": [dataclasses.asdict(row) for row in self.rows]}

    def format(self) -> str:
        """For people."""
        head = ["mixer", "causality", "pairs", "state bytes", "idea"]
        rows = [[r.name, r.causality, f"{r.pairs:,.1f}", f"{r.state_bytes:,.1f}", r.idea] for r in self.rows]
        note = f"Per token and query head, at {self.length:,} tokens, in each mixer's default settings."
        return f"{table(head, rows)}\n\n{note}"


LISTED_DIM = 512


def list_mixers(length: int) -> MixerList:
    """Every registered mixer at `length` tokens, as its own `cost` states it, in a model 512 wide."""
    return MixerList(length, [_row(name, length) for name in sorted(MIXERS)])


def _row(name: str, length: int) -> MixerRow:
    with torch.device("meta"):
        mixer = build(name, LISTED_DIM)
    cost = mixer.cost(length)
    per = length * getattr(MIXERS[name].Config(), "heads", 1)
    idea = (type(mixer).__doc__ or "").splitlines()[0]
    return MixerRow(name, idea, mixer.causality, cost.pairs / per, cost.state_bytes / per)
