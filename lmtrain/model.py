"""The decoder: nothing but architecture. Blocks are pre-norm residual; the mixers come from the pattern.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention.clock import Stream, read_clock
from attention.debug import check_finite
from attention.mixer import (
    Context,
    Cost,
    Mixer,
    MixerOutput,
    build,
    init_fan_in,
    parameter_count,
    residual_output,
)
from attention.shard import mean_of_ranks
from lmtrain.config import ModelConfig
from lmtrain.loss import linear_cross_entropy

NORM_EPS = 1e-5


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x). Shazeer, "GLU Variants Improve Transformer" (2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = init_fan_in(nn.Linear(dim, hidden, bias=False))
        self.up = init_fan_in(nn.Linear(dim, hidden, bias=False))
        self.down = init_fan_in(nn.Linear(hidden, dim, bias=False))
        residual_output(self.down.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class GELU(nn.Module):
    """down(gelu(up x)): the feed-forward layer of GPT-2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = init_fan_in(nn.Linear(dim, hidden, bias=False))
        self.down = init_fan_in(nn.Linear(hidden, dim, bias=False))
        residual_output(self.down.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down(F.gelu(self.up(x_BTD)))


FEED_FORWARD: dict[str, type[nn.Module]] = {"swiglu": SwiGLU, "gelu": GELU}
NORM: dict[str, Any] = {
    "rmsnorm": partial(nn.RMSNorm, eps=NORM_EPS),
    "layernorm": partial(nn.LayerNorm, eps=NORM_EPS, bias=False),
}


def pattern_of(config: ModelConfig) -> list[list[str]]:
    """The mixers of each layer: the words of the pattern, tiled; `a+b` is two side by side."""
    words = config.pattern.split()
    return [words[layer % len(words)].split("+") for layer in range(config.layers)]


class Block(nn.Module):
    """One layer: its mixers side by side, then the feed-forward layer, each behind a norm on the residual stream."""

    def __init__(self, config: ModelConfig, mixers: list[str]) -> None:
        super().__init__()
        self.mixer_norm = NORM[config.norm](config.dim)
        self.mixers = nn.ModuleDict({name: build_mixer(config, name) for name in mixers})
        self.ffn_norm = NORM[config.norm](config.dim)
        self.ffn = FEED_FORWARD[config.ffn](config.dim, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, ctx: Context, state: dict[str, Any] | None = None) -> MixerOutput:
        """The residual stream [B, T, D] behind this layer, and the auxiliary losses of its mixers."""
        mixed, losses = self.mix(self.mixer_norm(x_BTD), ctx.of_layer(x_BTD), state)
        x_BTD = x_BTD + self.dropout(mixed)
        fed_BTD = self.ffn(self.ffn_norm(x_BTD))
        check_finite(ctx, "outputs of the feed-forward layer", fed_BTD)
        return MixerOutput(x_BTD + self.dropout(fed_BTD), losses)

    def items(self) -> Iterable[tuple[str, Mixer]]:
        """The mixers side by side, by their names in the pattern."""
        return cast(Iterable[tuple[str, Mixer]], self.mixers.items())

    def mix(self, x_BTD: Tensor, ctx: Context, state: dict[str, Any] | None) -> MixerOutput:
        """The sum of the mixers' outputs, and of their losses by name."""
        outputs: list[MixerOutput] = []
        losses: dict[str, Tensor] = {}
        for name, mixer in self.items():
            mixer.check_shard(ctx)
            watched = ctx.watching(name)
            outputs.append(mixer(x_BTD, watched, None if state is None else state[name]))
            check_finite(watched, "outputs of the mixer", outputs[-1].y)
            add_losses(losses, outputs[-1].losses)
        y_BTD = outputs[0].y
        for output in outputs[1:]:
            y_BTD = y_BTD + output.y
        return MixerOutput(y_BTD, losses)


def build_mixer(config: ModelConfig, name: str) -> Mixer:
    """The mixer that the pattern calls `name`."""
    settings = dict(config.mixers[name])
    return build(settings.pop("kind"), config.dim, **settings)


def add_losses(total: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
    """Add losses by name into `total`."""
    for name, loss in losses.items():
        total[name] = total[name] + loss if name in total else loss


@dataclass
class ModelState:
    """What decoding remembers: one state per mixer of each layer, and where the tokens stand.

    distinct: each of the states once; of those that share what they hold (`Mixer.shared_state`), the first.
    """

    layers: list[dict[str, Any]]
    distinct: list[Any]
    stream: Stream

    @property
    def bytes(self) -> int:
        """Bytes of the living rows of all layers and sequences."""
        return sum(state.bytes for state in self.distinct)

    @property
    def capacity(self) -> int:
        """Bytes allocated, padding included."""
        return sum(state.capacity for state in self.distinct)


class DecoderLM(nn.Module):
    """A decoder-only language model over tokens [B, T].

    Weights: matrices N(0, init_std^2), init_std = fan_in^-1/2 unless given (the embedding's and a position table's
    fan_in is the width); matrices that write to the residual stream are scaled by (2 layers)^-1/2 after that;
    norms start at 1. What a mixer draws in its own way stays as it drew it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not known yet: it is the tokenizer's; set it to build the model")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = (
            nn.Embedding(config.learned_positions, config.dim) if config.learned_positions is not None else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, mixers) for mixers in pattern_of(config))
        self.norm = NORM[config.norm](config.dim)
        self.head = None if config.tied else init_fan_in(nn.Linear(config.dim, config.vocab_size, bias=False))
        self.activation_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.dim**-0.5)
            if isinstance(module, nn.Embedding | nn.Linear) and self.config.init_std is not None:
                nn.init.normal_(module.weight, std=self.config.init_std)
        with torch.no_grad():
            for parameter in self.parameters():
                if getattr(parameter, "residual_output", False):
                    parameter.mul_((2 * self.config.layers) ** -0.5)

    def forward(self, tokens: Tensor, ctx: Context | None = None, state: ModelState | None = None) -> Tensor:
        """Logits [B, T, V] of the token behind each of `tokens` [B, T] (int64)."""
        hidden_BTD, _ = self.hidden(tokens, ctx, state)
        return F.linear(hidden_BTD, self.head_weight)

    def loss(
        self, tokens: Tensor, labels: Tensor, ctx: Context | None = None, state: ModelState | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of -ln p (nats) over the labels [B, T] that are not -100, their number, and auxiliary losses.

        The logits of the whole sequence never exist at once. With a `state` the tokens go on from those it has seen. Of
        a shard (`ctx.shard`) the sum is over its labels. The number weighs the auxiliary losses, which are of tokens,
        scored or not: it is the shard's share by tokens in those of the whole rows, so numbers add up, too.
        """
        hidden_BTD, losses = self.hidden(tokens, ctx, state)
        total, count = linear_cross_entropy(hidden_BTD.flatten(0, 1), self.head_weight, labels.flatten())
        check_finite(ctx, "summed losses", total)
        if losses and ctx is not None and ctx.shard is not None:
            length = tokens.shape[1]
            count = mean_of_ranks(ctx.shard, count.double() / length) * length
        return total, count, losses

    def hidden(self, tokens: Tensor, ctx: Context | None = None, state: ModelState | None = None) -> MixerOutput:
        """The normed residual stream [B, T, D] behind the last layer, and the mixers' auxiliary losses.

        A dict in `ctx.statistics` gets the mixers' statistics: layer -> name in the pattern -> name -> scalar.
        With `ctx.debug` FloatingPointError says where a number that is not finite arose.
        """
        x_BTD = self.dropout(self._embed(tokens, ctx, state))
        check_finite(ctx, "embeddings", x_BTD)
        ctx = Context() if ctx is None else ctx
        if ctx.initial is None:
            ctx = dataclasses.replace(ctx, initial=F.rms_norm(x_BTD, x_BTD.shape[-1:]))
        losses: dict[str, Tensor] = {}
        for layer, block in enumerate(self.layers):
            watched = ctx.watching(layer)
            if self.activation_checkpointing and torch.is_grad_enabled() and state is None:
                x_BTD, added = checkpoint(block, x_BTD, watched, use_reentrant=False)
            else:
                x_BTD, added = block(x_BTD, watched, None if state is None else state.layers[layer])
            add_losses(losses, added)
        return MixerOutput(self.norm(x_BTD), losses)

    def _embed(self, tokens: Tensor, ctx: Context | None, state: ModelState | None) -> Tensor:
        x_BTD = self.embedding(tokens)
        if self.positions is None and state is None:
            return x_BTD
        clock = read_clock(tokens, ctx, None if state is None else state.stream)
        if state is not None:
            state.stream = clock.after(len(tokens))
        if self.positions is None:
            return x_BTD
        if int(clock.position.max()) >= self.positions.num_embeddings:
            raise ValueError(
                f"position {int(clock.position.max())} lies outside the table of "
                f"model.learned_positions = {self.positions.num_embeddings}"
            )
        return x_BTD + self.positions(clock.position)

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast(list[Block], list(self.blocks))

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: maps the hidden state to logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def init_state(self, batch: int, limit: int | None = None) -> ModelState:
        """An empty state for `batch` sequences; no key in it outlives `limit` tokens (`Mixer.init_state`)."""
        states: dict[Mixer, Any] = {}
        distinct = []
        for mixer, owner in self._state_owners().items():
            if owner is mixer:
                states[mixer] = mixer.init_state(batch, limit)
                distinct.append(states[mixer])
            else:
                states[mixer] = states[owner].of_another_layer()
        layers = [{name: states[mixer] for name, mixer in block.items()} for block in self.layers]
        start = torch.zeros(batch, dtype=torch.int64, device=self.embedding.weight.device)
        return ModelState(layers, distinct, Stream(0, start))

    def _state_owners(self) -> dict[Mixer, Mixer]:
        """For each mixer, in order, the one whose state it uses: itself, or the first of the same `shared_state`."""
        first: dict[Mixer | str, Mixer] = {}
        mixers = [mixer for block in self.layers for _, mixer in block.items()]
        return {mixer: first.setdefault(mixer.shared_state or mixer, mixer) for mixer in mixers}

    @property
    def causality(self) -> str:
        """`strict`, or `selects_ahead` if any mixer's selection sees later tokens."""
        kinds = {mixer.causality for block in self.layers for _, mixer in block.items()}
        return "selects_ahead" if "selects_ahead" in kinds else "strict"

    def pending(self) -> list[Tensor]:
        """The sums from which the mixers learn online; see `Mixer.pending`."""
        return [tensor for block in self.layers for _, mixer in block.items() for tensor in mixer.pending()]

    def after_step(self, skipped: bool = False) -> None:
        """Let the mixers move what they learn online; see `Mixer.after_step`."""
        for block in self.layers:
            for _, mixer in block.items():
                mixer.after_step(skipped)

    def layer_costs(self, length: int) -> list[dict[str, Cost]]:
        """For each layer the cost of each mixer, and of the feed-forward layer as `ffn`, at `length` tokens.

        A state that mixers share is charged to the first of them.
        """
        costs, owners = [], self._state_owners()
        for block in self.layers:
            of_layer = {name: mixer.cost(length) for name, mixer in block.items()}
            for name, mixer in block.items():
                if owners[mixer] is not mixer:
                    of_layer[name] = dataclasses.replace(of_layer[name], state_bytes=0)
            matrices = sum(p.numel() for p in block.ffn.parameters())
            of_layer["ffn"] = Cost(matrices, 2 * length * matrices, 0, 0)
            costs.append(of_layer)
        return costs

    def cost(self, length: int) -> Cost:
        """The whole model's cost for one sequence of `length` tokens, embedding, norms and head included."""
        total = Cost(0, 2 * length * self.config.dim * self.embedding.num_embeddings, 0, 0)
        for of_layer in self.layer_costs(length):
            total = sum(of_layer.values(), total)
        return Cost(parameter_count(self), total.flops, total.pairs, total.state_bytes)
