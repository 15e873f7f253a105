"""Mega: a damped moving average gives position and unlimited memory; gated attention inside chunks refines it.

Source: Ma et al., "Mega: Moving Average Equipped Gated Attention" (2022, arXiv 2209.10655), sections 3.1 to 3.4, and
facebookresearch/mega. The paper's attention functions that are no softmax (laplace, relu^2) are not offered. It
computes the average by FFT; here it is a scan in float32, since an FFT lets rounded traces of later tokens through.

Shapes: B batch, T new tokens, R of them and the earlier ones of open chunks, d model width, n numbers that a channel
remembers, z width of queries and keys, E width of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.cache import LivingKeys
from attention.clock import Clock, read_clock
from attention.earlier import EarlierKeys, earlier
from attention.lifetimes import FOREVER, Lifetimes
from attention.mixer import (
    Context,
    Cost,
    Mixer,
    MixerOutput,
    WideModule,
    no_weight_decay,
    parameter_count,
    register,
    report,
    setting,
)
from attention.ops.attend import attend
from attention.ops.rotary import apply_rotary, rotary_table
from attention.ops.scan import diagonal_scan
from attention.shard import tied, to_higher
from attention.spans import block_end

BASE = 10000.0  # of the rotary bias
STD = 0.02  # of matrices, of the gains of queries and keys, and of the bias
STD_DECAY = 0.2


@dataclass
class MegaConfig:
    """Settings of `mega`. It has one head, and its position is that of the average and of a bias inside the chunk."""

    query_dim: int | None = setting(
        None, "width of queries and keys, even; null = dim / 4, rounded up to even", at_least=2
    )
    value_dim: int | None = setting(None, "width of values; null = 2 dim", at_least=1)
    ema_dim: int = setting(16, "numbers that the moving average remembers of each channel", at_least=1)
    chunk: int | None = setting(1024, "tokens that attend among themselves; null = the whole document", at_least=1)

    def problems(self, dim: int) -> list[tuple[str, str]]:
        """Rules that hold between settings: (setting, message) for each one broken."""
        if self.query_dim is None or self.query_dim % 2 == 0:
            return []
        message = f"query_dim {self.query_dim} must be even: the bias rotates pairs of features"
        return [("query_dim", f"{message}; nearest: {self.query_dim - 1}, {self.query_dim + 1}")]

    def query_width(self, dim: int) -> int:
        """query_dim, filled in."""
        return 2 * -(-dim // 8) if self.query_dim is None else self.query_dim

    def value_width(self, dim: int) -> int:
        """value_dim, filled in."""
        return 2 * dim if self.value_dim is None else self.value_dim


class DampedEma(WideModule):
    """x' = silu(e + omega x), e the damped moving average of each channel (equation 2 of the paper), n numbers each:

        h_t = q h_{t-1} + a beta x_t;  e_t = sum over n of gamma n^-1/2 h_t
        a = sigmoid(alpha), q = 1 - a sigmoid(delta)

    Parameters and h are float32 or wider: in bfloat16 what decays slowly would not decay at all. None decays as weight.
    """

    def __init__(self, dim: int, ema_dim: int) -> None:
        super().__init__()
        sign = 1.0 - 2.0 * (torch.arange(ema_dim) % 2)
        self.alpha = no_weight_decay(nn.Parameter(STD_DECAY * torch.randn(dim, ema_dim)))
        self.delta = no_weight_decay(nn.Parameter(STD_DECAY * torch.randn(dim, ema_dim)))
        self.beta = no_weight_decay(nn.Parameter(sign + STD * torch.randn(dim, ema_dim)))
        self.gamma = no_weight_decay(nn.Parameter(torch.randn(dim, ema_dim)))
        self.omega = no_weight_decay(nn.Parameter(torch.randn(dim)))

    def forward(self, x: Tensor, h: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """x' [B, T, d] and h [B, d, n] behind it, in at least float32, from x and the h before it."""
        gain = self.gamma * self.gamma.shape[1] ** -0.5
        average, h = diagonal_scan(x, self.log_decay(), self.alpha.sigmoid() * self.beta, gain, h, reset)
        return F.silu(average + self.omega * x), h

    def before_shard(self, x: Tensor, reset: Tensor | None, clock: Clock) -> Tensor:
        """h [B, d, n] before the first token of a shard, from what the tokens x [B, T, d] of each lower rank leave."""
        assert clock.shard is not None
        _, left = self(x, None, reset)
        before = to_higher(clock.shard, [left])
        h = tied(torch.zeros_like(left), before)
        for rank, behind in enumerate(before):
            there = clock.of_rank(rank)
            goes_on = (there.position != 0).all(1)[:, None, None]
            h = behind + torch.where(goes_on, (self.log_decay() * there.time.shape[1]).exp() * h, 0.0)
        return h

    def log_decay(self) -> Tensor:
        """log q [d, n], finite: a q that rounds to 0 counts as the least number above it that 1 - q can tell."""
        forgotten = self.forgotten()
        return torch.log1p(-forgotten.clamp(max=1.0 - torch.finfo(forgotten.dtype).eps / 2))

    def forgotten(self) -> Tensor:
        """1 - q [d, n]: the share of h that a step forgets."""
        return self.alpha.sigmoid() * self.delta.sigmoid()

    def numbers(self) -> dict[str, Tensor]:
        """Worth watching: the mean memory 1 / (1 - q) in tokens, and the share of q that float32 rounds to 1 or 0."""
        forgotten = self.forgotten()
        stuck = (forgotten < 2.0**-25) | (forgotten > 1.0 - 2.0**-24)
        return {
            "memory_tokens": forgotten.clamp(min=2.0**-25).reciprocal().mean(),
            "saturated_decays": stuck.to(forgotten.dtype).mean(),
        }


@register("mega")
class Mega(Mixer):
    """A moving average, then gated attention of one head inside chunks of the document, then a gated residual.

    With x' of the average (`DampedEma`), X the residual stream in front of the norm (x, where nobody tells):

        phi, Z, r, hx = x' W + b;  phi = sigmoid(phi), Z = silu(Z), r = silu(r);  v = silu(x W_v + b_v)
        q = Z kappa_q + mu_q, k = Z kappa_k + mu_k;  logit_ij = q_i k_j z^-1/2 + rot_i(bias_q) rot_j(bias_k)
        y = phi (silu(hx + (r o) W_h + b_h) - X), so that X + y = phi silu(..) + (1 - phi) X

    A query meets the tokens of its own chunk, up to itself; chunks are counted from the start of the document, where
    the average begins anew. The bias tells i - j alone, and is z more columns of queries and keys. The Triton kernels
    of attention take query_dim up to 128 and value_dim up to 256; wider, the CPU's path serves a GPU too.
    """

    Config = MegaConfig
    sequence_parallel = "the average, and keys of chunks that go on behind their shard"

    def __init__(self, dim: int, config: MegaConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.query_dim, self.value_dim = dim, config.query_width(dim), config.value_width(dim)
        self.widths = [dim, self.query_dim, self.value_dim, dim]  # of phi, Z, r, hx
        self.ema = DampedEma(dim, config.ema_dim)
        self.base = _linear(dim, sum(self.widths))
        self.value = _linear(dim, self.value_dim)
        self.output = _linear(self.value_dim, dim)
        width = (self.query_dim,)
        self.query_gain, self.key_gain = (nn.Parameter(STD * torch.randn(width)) for _ in range(2))
        self.query_shift, self.key_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.query_bias, self.key_bias = (nn.Parameter(STD * torch.randn(width)) for _ in range(2))
        for gain in (self.query_gain, self.key_gain, self.query_shift, self.key_shift, self.query_bias, self.key_bias):
            no_weight_decay(gain)

    def forward(self, x: Tensor, ctx: Context | None = None, state: MegaState | None = None) -> MixerOutput:
        """y [B, T, d] from x [B, T, d]; see `Mixer.forward`. ValueError for a state of another mixer's sizes."""
        _check_state(state, self)
        clock = read_clock(x, ctx, None if state is None else state.stream)
        reset = None if clock.end is None else (clock.position == 0).expand(x.shape[:2])
        before = None if state is None else state.h
        if clock.shard is not None:
            before = self.ema.before_shard(x, reset, clock)
        mixed, h = self.ema(x, before, reset)
        update, shared, reset_gate, candidate = self.base(mixed.to(x.dtype)).split(self.widths, -1)
        update, shared, reset_gate = update.sigmoid(), F.silu(shared), F.silu(reset_gate)
        q = shared * self.query_gain + self.query_shift
        k = shared * self.key_gain + self.key_shift
        past = earlier(state, clock, ("mega", *self.grid), self.lifetimes)
        out = self.attend_in_chunks(q, k, F.silu(self.value(x)), clock, past)
        candidate = F.silu(candidate + self.output(reset_gate * out))
        if state is not None:
            state.h = h.detach()
            state.advance(clock)
        report(ctx, lambda: {**self.ema.numbers(), "update_gate": update.mean(), "reset_gate": reset_gate.mean()})
        residual = x if ctx is None or ctx.residual is None else ctx.residual
        return MixerOutput(update * (candidate - residual), {})

    @property
    def grid(self) -> tuple[int, int | None]:
        """z and the chunk: mixers that share them share lifetimes and tables."""
        return self.query_dim, self.config.chunk

    def attend_in_chunks(
        self, q: Tensor, k: Tensor, v: Tensor, clock: Clock, state: LivingKeys | EarlierKeys | None
    ) -> Tensor:
        """o [B, T, E] from q, k [B, T, z] and v [B, T, E]; with a state, meets what it holds too, and adds to it."""
        q, k, v = (t[:, None].to(v.dtype) for t in (q, k, v))
        grid = self.grid
        life = clock.once(("mega", *grid), lambda: self.lifetimes(clock))
        if state is None:
            table = clock.once(("mega table", *grid), lambda: self.table(clock.position[:, None]))
        else:
            k, v, life = state.extend(k, v, life, clock)
            table = self.table(life.birth - state.starts(clock))
        new = slice(k.shape[2] - q.shape[2], None)
        turned = apply_rotary(self.key_bias.expand(1, 1, 1, -1), table)
        k = torch.cat([k, turned.to(k.dtype).expand(len(k), -1, -1, -1)], -1)
        turned = apply_rotary(self.query_bias.expand(1, 1, 1, -1), (table[0][:, :, new], table[1][:, :, new]))
        q = torch.cat([q * self.query_dim**-0.5, turned.to(q.dtype).expand(len(q), -1, -1, -1)], -1)
        return attend(q, k, v, life, time=clock.query_time, scale=1.0)[0].squeeze(1)

    def lifetimes(self, clock: Clock) -> Lifetimes:
        """Of the tokens' keys, int32 [B or 1, 1, T]: to the end of the chunk, or of the document."""
        if self.config.chunk is None:
            death = torch.full_like(clock.time, FOREVER)[:, None]
        else:
            death = block_end(clock, self.config.chunk)
        return Lifetimes(clock.time[:, None].to(torch.int32), clock.until(death))

    def table(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary table of the bias, for positions [B or 1, 1, R]: within the chunk they are small, and do as well."""
        if self.config.chunk is not None:
            position = position % self.config.chunk
        return rotary_table(position, self.query_dim, BASE)

    def init_state(self, batch: int, limit: int | None = None) -> MegaState:
        """The average of nothing, and no keys, for `batch` sequences; the average forgets by itself, at any `limit`."""
        return MegaState(batch, self.ema.alpha, self.sizes, limit)

    @property
    def sizes(self) -> tuple[int, ...]:
        """d, n, z, E: mixers of other sizes cannot go on from each other's states."""
        return self.dim, self.config.ema_dim, self.query_dim, self.value_dim

    def cost(self, length: int) -> Cost:
        """parameters 2dE + E + (d + 1)(2d + z + E) + d + 4dn + d + 6z, flops 2T(2dE + d(2d + z + E)) + (4z + 2E) pairs
        + 6Tdn, state d n numbers of at least 32 bits and z + E for each token of the open chunk."""
        dim, ema_dim, query_dim, value_dim = self.sizes
        chunk = length if self.config.chunk is None else self.config.chunk
        whole, rest = divmod(length, chunk)
        pairs = whole * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2
        kept = length if self.config.chunk is None else rest
        matrices = dim * (2 * value_dim + sum(self.widths))
        return Cost(
            parameters=parameter_count(self),
            flops=2 * length * matrices + (4 * query_dim + 2 * value_dim) * pairs + 6 * length * dim * ema_dim,
            pairs=pairs,
            state_bytes=dim * ema_dim * self.ema.alpha.element_size()
            + kept * (query_dim + value_dim) * self.value.weight.element_size(),
        )


class MegaState(LivingKeys):
    """What decoding remembers: h [B, d, n] of the average, and keys and values of the tokens of open chunks."""

    def __init__(self, batch: int, like: Tensor, sizes: tuple[int, ...], limit: int | None = None) -> None:
        super().__init__(batch, like.device, limit)
        self.sizes = sizes
        self.h = torch.zeros(batch, *sizes[:2], dtype=like.dtype, device=like.device)

    @property
    def bytes(self) -> int:
        """Bytes of h and of the living rows, over all sequences."""
        return super().bytes + self.h.nbytes

    @property
    def capacity(self) -> int:
        """Bytes allocated, padding included."""
        return super().capacity + self.h.nbytes


def _check_state(state: object, mixer: Mega) -> None:
    """ValueError unless a mixer of the same sizes made it."""
    if state is None:
        return
    if not isinstance(state, MegaState):
        raise ValueError(f"a mega mixer needs a state of its own, got {type(state).__name__}")
    if state.sizes != mixer.sizes:
        names = "dim, ema_dim, query_dim, value_dim"
        raise ValueError(f"the state was made for a mega mixer of ({names}) = {state.sizes}, not {mixer.sizes}")


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Weights N(0, 0.02^2), biases 0, as published."""
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=STD)
    nn.init.zeros_(linear.bias)
    return linear
