"""How much memory training takes, estimated without making any weights.

What autograd keeps of a layer for the backward pass, in numbers per token (d width, F width of the
feed-forward layer). The residual stream and its norms stay float32; what enters or leaves a matrix product
has `train.dtype`:

    two norms       2d each (layernorm: d), float32: the stream, and the stream divided by its norm
    two inputs      d each; where each linear layer casts its own 16-bit copy, once per layer that reads it
    mixer           elements of its matrices / d: for softmax attention q, k, v and the heads' outputs
    feed-forward    4F: gate, up, silu(gate), their product (gelu: 2F)

The model adds the initial states, the last norm and the loss. While one layer goes backward, gradients as wide
as its feed-forward layer are on their way; with activation checkpointing only the stream in front of each layer
is kept, and one layer at a time is computed again. Not counted: what is smaller by a head's width (log-sum-exp,
rotary tables) and the allocator's rounding. Peaks measured on a CPU were 0.8 to 1.1 times the estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from lmtrain.config import Config, ModelConfig
from lmtrain.loss import FEW_LOGITS, default_chunk
from lmtrain.model import Block, DecoderLM
from lmtrain.optimizer import build_optimizer

FLOAT32 = 4
"""Bytes of a number."""

STREAMS_OF_NORM = {"rmsnorm": 2, "layernorm": 1}
"""Tensors as large as the residual stream that a norm keeps."""

HIDDEN_OF_FFN = {"swiglu": 4, "gelu": 2}
"""Tensors as wide as the feed-forward layer that it keeps."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    activations: at the peak of the backward pass of one micro-batch, without and with activation checkpointing;
    logits: the loss and what it keeps; training: the peak of a step as configured.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    activations_checkpointed: int
    logits: int
    training: int


@dataclass(frozen=True)
class Passing:
    """Bytes that the forward and backward pass of some tokens take beside weights and gradients.

    kept: until the backward pass; passing: on their way in it; largest: those of the layer that keeps most.
    """

    kept: int
    kept_checkpointed: int
    passing: int
    largest: int
    logits: int

    @property
    def activations(self) -> int:
        """At the peak of the backward pass."""
        return self.kept + self.passing

    @property
    def activations_checkpointed(self) -> int:
        """The same where each layer is computed again."""
        return self.kept_checkpointed + self.largest + self.passing

    def peak(self, checkpointing: bool) -> int:
        """In the backward pass, or before it, when the loss is computed."""
        if checkpointing:
            return max(self.activations_checkpointed, self.kept_checkpointed + self.logits)
        return max(self.activations, self.kept + self.logits)


def estimate_memory(config: Config, model: DecoderLM) -> Memory:
    """Of `model`, which may lie on the meta device, trained as `config` says, in one process."""
    passing = estimate_passing(config, model, config.micro_batch() * config.data.seq_len)
    weights = nbytes(model.parameters())
    moments = nbytes(build_optimizer(model, config.optimizer).state().values())
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=moments,
        activations=passing.activations,
        activations_checkpointed=passing.activations_checkpointed,
        logits=passing.logits,
        training=2 * weights + moments + passing.peak(config.train.activation_checkpointing),
    )


def estimate_passing(config: Config, model: DecoderLM, tokens: int) -> Passing:
    """Of `model` and a micro-batch of so many tokens."""
    narrow = FLOAT32 if config.train.dtype == "float32" else 2
    stream = config.model.dim * FLOAT32 * tokens
    blocks = [block_bytes(block, config.model, narrow) * tokens for block in model.layers]
    passing = HIDDEN_OF_FFN[config.model.ffn] * config.model.hidden * narrow * tokens
    # Kept throughout: the initial states, the last norm with its output, autocast's copies of the matrices.
    ends = (2 + STREAMS_OF_NORM[config.model.norm]) * stream
    if narrow < FLOAT32:
        ends += narrow * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return Passing(
        kept=sum(blocks) + ends,
        kept_checkpointed=len(blocks) * stream + ends,
        passing=passing,
        largest=max(blocks),
        logits=logits_bytes(tokens, config.model.dim, model.embedding.num_embeddings),
    )


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, meta ones included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def block_bytes(block: Block, config: ModelConfig, narrow: int) -> int:
    """Bytes per token that a layer keeps; narrow: of a number in a matrix product."""
    made = sum(p.numel() for p in block.mixers.parameters() if p.dim() > 1) // config.dim
    made += HIDDEN_OF_FFN[config.ffn] * config.hidden
    norms = 2 * STREAMS_OF_NORM[config.norm]
    inputs = 2 if narrow == FLOAT32 else _readers(block.mixers) + _readers(block.ffn)
    return (FLOAT32 * norms + narrow * inputs) * config.dim + narrow * made


def logits_bytes(tokens: int, dim: int, vocabulary: int) -> int:
    """Bytes of the loss: logits and their log-softmax where they are few, else a chunk and the gradients."""
    if tokens * vocabulary <= FEW_LOGITS:
        return 2 * FLOAT32 * tokens * vocabulary
    chunk = min(tokens, default_chunk(vocabulary))
    return FLOAT32 * (2 * chunk * vocabulary + tokens * dim + vocabulary * dim)


def _readers(part: nn.Module) -> int:
    """Linear layers that read the normed stream: those that do not write to it, at least one."""
    linear = [module for module in part.modules() if isinstance(module, nn.Linear)]
    return max(1, sum(not hasattr(module.weight, "residual_output") for module in linear))
