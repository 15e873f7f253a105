"""Averages learnt online: the centroids of a clustering, the codes of a codebook. No gradient moves them.

A forward pass never writes them: activation checkpointing runs it twice, evaluation must not teach. What a micro-batch
has to say waits in `pending` from the backward pass on, which runs once for it, and moves the averages after the
optimizer step, once for all micro-batches and all processes that train together.

Source: the moving averages of van den Oord et al., "Neural Discrete Representation Learning" (2017, arXiv 1711.00937),
appendix A.1, as a step towards the mean of what was assigned: the quotient of two averages would blow an entry up that
nothing is assigned to.

Legend of shapes: B batch, H heads, T tokens, C entries of a head, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention.mixer import WideModule
from attention.ops.codes import AT_ONCE, code_sums

ROUNDING = 1e-5  # of the sum of squares: a smaller sum of squared distances is none


class OnlineMeans(WideModule):
    """`means` [H, C, D], each an average of the vectors that were assigned to it, the recent ones foremost.

    With b vectors of sum s assigned to an entry in an optimizer step, and g = decay:

        count <- g count + (1 - g) b                        count starts at 1
        mean  <- mean + (1 - g) (s - b mean) / count

    An entry that nothing is assigned to stays, and comes at once when it is found again. With `dead` > 0, an entry
    whose count falls below that part of an equal share moves instead: the n-th emptiest one to the mean of this step's
    vectors of the entry with the n-th largest error, if that exceeds the mean error; the two share its count. Which and
    whereto follows from the sums of the step alone, so it is the same in every process and after a resume.

    `means` and `count` are part of a checkpoint; they are float32 or wider whatever the module is cast to, for bfloat16
    rounds 0.999 to 1.
    """

    means: Tensor
    count: Tensor
    pending: Tensor

    def __init__(self, means: Tensor, decay: float, dead: float = 0.0) -> None:
        super().__init__()
        self.decay, self.dead = decay, dead
        self.register_buffer("means", means)
        self.register_buffer("count", torch.ones_like(means[..., 0]))
        # Of the vectors assigned since the last step: their sum, the sum of their squares, their number; [H, C, D + 2].
        self.register_buffer("pending", means.new_zeros(*means.shape[:2], means.shape[2] + 2), persistent=False)

    def learn(self, y: Tensor, x: Tensor, entry: Tensor) -> Tensor:
        """y, unchanged; its backward pass teaches the next step that the vectors x belong to `entry`.

        x [B, H, T, D]; entry int [B, H, T], in 0..C-1. y: anything that the loss depends on.
        """
        if not (torch.is_grad_enabled() and y.requires_grad):
            return y
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            sums = torch.zeros_like(self.pending)
            for some, theirs in zip(x.split(AT_ONCE, 2), entry.split(AT_ONCE, 2), strict=True):
                some = some.to(sums.dtype)
                some = torch.cat([some, some.square().sum(-1, keepdim=True)], -1)
                number, total = code_sums(theirs, some, self.means.shape[1])
                sums += torch.cat([total, number[..., None]], -1).sum(0)
        return _Learn.apply(y, sums, self.pending)

    def step(self, skipped: bool = False) -> None:
        """Move towards what is pending, or drop it if the optimizer skipped its step."""
        pending = self.pending  # of all ranks: `Mixer.pending` lets them add theirs up before
        if not skipped:
            total, squares, number = pending[..., :-2], pending[..., -2], pending[..., -1]
            error = squares - (2 * total - number[..., None] * self.means).mul(self.means).sum(-1)
            error = error.where(error > ROUNDING * squares, 0.0)
            fresh = 1.0 - self.decay
            self.count.lerp_(number, fresh)
            moved = (total - number[..., None] * self.means) / self.count[..., None].clamp(min=1e-6)
            self.means.add_(moved, alpha=fresh)
            if self.dead:
                self._revive(total, number, error)
        self.pending.zero_()

    def _revive(self, total: Tensor, number: Tensor, error: Tensor) -> None:
        emptiest = self.count.argsort(dim=-1, stable=True)
        worst = error.argsort(dim=-1, descending=True, stable=True)
        least = self.dead * self.count.mean(-1, keepdim=True)
        is_dead = self.count.gather(1, emptiest) < least
        splits = (error.gather(1, worst) > error.mean(-1, keepdim=True)) & (self.count.gather(1, worst) > 2 * least)
        splits &= number.gather(1, worst) > 1
        head, place = (is_dead & splits).nonzero(as_tuple=True)
        old, new = worst[head, place], emptiest[head, place]
        self.means[head, new] = total[head, old] / number[head, old, None]
        self.count[head, old] /= 2
        self.count[head, new] = self.count[head, old]


class _Learn(torch.autograd.Function):
    """An identity whose backward pass adds `sums` to `pending`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sums: Tensor, pending: Tensor) -> Tensor:
        ctx.save_for_backward(sums)
        ctx.pending = pending
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.pending.add_(*ctx.saved_tensors)
        return grad, None, None
