"""Random inputs of a mixer: its tokens, and what a model tells it about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention.mixer import Context, Mixer


@dataclass(frozen=True)
class Tokens:
    """x, the initial states and the residual stream of the same tokens: `vectors` [3, B, T, d]."""

    vectors: Tensor

    @staticmethod
    def random(batch: int, length: int, dim: int, seed: int = 1) -> Tokens:
        """Independent numbers of order one, float64."""
        generator = torch.Generator().manual_seed(seed)
        return Tokens(torch.randn(3, batch, length, dim, generator=generator, dtype=torch.float64))

    @property
    def x(self) -> Tensor:
        """The input [B, T, d]."""
        return self.vectors[0]

    def part(self, start: int, stop: int) -> Tokens:
        """Tokens start..stop-1."""
        return Tokens(self.vectors[:, :, start:stop])

    def row(self, row: int) -> Tokens:
        """One sequence of the batch."""
        return Tokens(self.vectors[:, row : row + 1])

    def then(self, others: Tokens, cut: int) -> Tokens:
        """These tokens before `cut`, the others from `cut` on."""
        return Tokens(torch.cat([self.vectors[:, :, :cut], others.vectors[:, :, cut:]], 2))

    def to(self, dtype: torch.dtype) -> Tokens:
        """In another precision."""
        return Tokens(self.vectors.to(dtype))

    def ctx(self, **fields: Any) -> Context:
        """What a model would say of them; `fields`: positions, document_ends, training."""
        return Context(initial=self.vectors[1], residual=self.vectors[2], **fields)

    def run(self, mixer: Mixer, state: Any = None, **fields: Any) -> Tensor:
        """y [B, T, d]."""
        return mixer(self.x, self.ctx(**fields), state).y


@dataclass(frozen=True)
class Packing:
    """How each row of a batch is cut into documents; every row holds as many tokens."""

    lengths: list[list[int]]

    @property
    def positions(self) -> Tensor:
        """int64 [B, T]."""
        return torch.tensor([[p for n in row for p in range(n)] for row in self.lengths])

    @property
    def document_ends(self) -> Tensor:
        """int64 [B, T]."""
        rows = []
        for row in self.lengths:
            ends = [sum(row[: i + 1]) for i in range(len(row))]
            rows.append([end for end, n in zip(ends, row, strict=True) for _ in range(n)])
        return torch.tensor(rows)

    def spans(self) -> list[tuple[int, int, int]]:
        """(row, start, stop) of every document."""
        return [(r, sum(row[:i]), sum(row[: i + 1])) for r, row in enumerate(self.lengths) for i in range(len(row))]

    def part(self, start: int, stop: int, *names: str) -> dict[str, Tensor]:
        """The fields called `names` for tokens start..stop-1, as the context of those tokens says them."""
        fields = {"positions": self.positions, "document_ends": self.document_ends - start}
        return {name: fields[name][:, start:stop] for name in names}


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where one is not a number."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).detach().abs().nan_to_num(torch.inf).max()) if a.numel() else 0.0


def train_a_little(mixer: Mixer, dim: int) -> None:
    """Four steps of plain gradient descent towards random targets."""
    for step in range(4):
        tokens, target = (Tokens.random(2, 33, dim, seed=100 + 2 * step + i) for i in range(2))
        output = mixer(tokens.x, tokens.ctx(training=True))
        loss = (output.y - target.x).square().mean() + sum(output.losses.values())
        mixer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in mixer.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
        mixer.after_step()
