"""Not enough memory: what takes most of it, and the setting that makes it less."""

from __future__ import annotations

from dataclasses import asdict

import torch

from lmtrain.config import Config
from lmtrain.model import DecoderLM
from lmtrain.progress import si
from lmtrain.rank_memory import layout_of, rank_memory
from parallel.world import World

_IN_PARTS = "more ranks with parallel.engine=deepspeed and parallel.zero=3"
REMEDIES = {
    "weights": f"a smaller model.dim or model.layers, or {_IN_PARTS}",
    "masters": f"a smaller model.dim or model.layers, or {_IN_PARTS}",
    "gradients": f"a smaller model.dim or model.layers, or {_IN_PARTS}",
    "optimizer": f"a smaller model.dim or model.layers, or {_IN_PARTS}",
    "gathered": "a smaller model.dim",
    "buffers": "a smaller model.dim",
    "activations": "a smaller train.micro_batch (the batch stays), or train.activation_checkpointing=true",
    "logits": "a smaller train.micro_batch (the batch stays), or a smaller vocabulary",
}
"""What makes each item of `RankMemory` smaller."""


def is_exhausted(error: BaseException) -> bool:
    """Whether `error` says that there is no memory; torch says so on a CPU by a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_words(config: Config, world: World) -> str:
    """The largest item on each rank as estimated (`lmtrain.rank_memory`), and what to do about it."""
    with torch.device("meta"):
        model = DecoderLM(config.model)
    memory = asdict(rank_memory(config, model, layout_of(config, world.size, world.sequence)))
    largest = max(REMEDIES, key=memory.__getitem__)
    return (
        f"out of memory; of about {si(memory['total'])}B that a step takes here, the {largest} are the largest part, "
        f"{si(memory[largest])}B: choose {REMEDIES[largest]}; all parts: lmtrain inspect"
    )
