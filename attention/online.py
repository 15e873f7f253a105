"""Averages learnt online: the centroids of a clustering, the codes of a codebook. No gradient moves them.

A forward pass never writes them: activation checkpointing runs it twice, evaluation must not teach. What a micro-batch
has to say waits in `pending` from the backward pass on, which runs once for it, and moves the averages after the
optimizer step, once for all micro-batches.

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


class OnlineMeans(WideModule):
    """`means` [H, C, D], each an average of the vectors that were assigned to it, the recent ones foremost.

    With b vectors of sum s assigned to an entry in an optimizer step, and g = decay:

        count <- g count + (1 - g) b                        count starts at 1
        mean  <- mean + (1 - g) (s - b mean) / count

    An entry that nothing is assigned to stays, and comes at once when it is found again. `means` and `count` are part
    of a checkpoint; they are float32 or wider whatever the module is cast to, for bfloat16 rounds 0.999 to 1.
    """

    means: Tensor
    count: Tensor
    pending: Tensor

    def __init__(self, means: Tensor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", means)
        self.register_buffer("count", torch.ones_like(means[..., 0]))
        # Sums, and in the last column numbers, of the vectors assigned since the last step: [H, C, D + 1].
        self.register_buffer("pending", means.new_zeros(*means.shape[:2], means.shape[2] + 1), persistent=False)

    def learn(self, y: Tensor, x: Tensor, entry: Tensor) -> Tensor:
        """y, unchanged; its backward pass teaches the next step that the vectors x belong to `entry`.

        x [B, H, T, D]; entry int64 [B, H, T], in 0..C-1. y: anything that the loss depends on.
        """
        if not (torch.is_grad_enabled() and y.requires_grad):
            return y
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.to(self.pending.dtype)
            # A product, not a scattered sum: its order is fixed on every device.
            assigned = torch.nn.functional.one_hot(entry, self.means.shape[1]).to(x.dtype)
            sums = torch.einsum("bhtc,bhtd->hcd", assigned, torch.cat([x, torch.ones_like(x[..., :1])], -1))
        return _Learn.apply(y, sums, self.pending)

    def step(self, skipped: bool = False) -> None:
        """Move towards what is pending, or drop it if the optimizer skipped its step."""
        pending = self.pending  # of this process; ranks that train together add theirs up here
        if not skipped:
            fresh = 1.0 - self.decay
            total, number = pending[..., :-1], pending[..., -1]
            self.count.lerp_(number, fresh)
            moved = (total - number[..., None] * self.means) / self.count[..., None].clamp(min=1e-6)
            self.means.add_(moved, alpha=fresh)
        self.pending.zero_()


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
