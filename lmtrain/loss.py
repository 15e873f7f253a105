"""Cross entropy of a linear head, without ever holding the logits of a whole sequence.

Shapes: N tokens, d features, V vocabulary, C tokens of one chunk. Losses are in nats, sums over tokens:
whoever accumulates micro-batches divides by the count of the whole batch once.

The gradient of a chunk's logits is its softmax minus the labels' one-hot rows, known as soon as its logits
are. So the forward finishes both gradients chunk by chunk (three products of 2 N d V flops in all, as many
as plain autograd needs), and the backward only scales them: logits take C V numbers instead of N V.

It is a custom operator, so `torch.compile(fullgraph=True)` keeps it whole and the chunks stay one at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

IGNORE = -100
CHUNK_BYTES = 64 * 2**20
MIN_CHUNK = 256


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(hidden @ weight.T)[label] over the scored tokens, and their number.

    hidden [N, d], weight [V, d] (it may be the embedding's), labels [N] int64, of which -100 is not scored.
    Returns (loss_sum, count): a scalar in nats, float32 (float64 for float64 inputs), and a 0-dim int64.
    `chunk` tokens are done at a time; by default as many as keep their logits within 64 MiB, but 256 at
    least. If that is all of them, plain `F.linear` and `F.cross_entropy` do the same.

    Under `torch.autocast` the products run in its dtype; softmax, loss and the gradient of `weight`, summed
    over chunks, are float32 whatever the inputs are. Differentiable once.
    """
    assert hidden.ndim == weight.ndim == 2, "hidden [N, d], weight [V, d]"
    assert labels.shape == hidden.shape[:1], "labels [N]"
    count = (labels != IGNORE).sum()
    if chunk is None:
        chunk = default_chunk(len(weight))
        if len(hidden) <= chunk:
            logits = F.linear(hidden, weight).to(_softmax_dtype(hidden))
            return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), count
    hidden_learns, weight_learns = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    loss_sum, _, _ = _chunked(
        hidden, weight, labels, chunk, _product_dtype(hidden), hidden_learns, weight_learns
    )
    return loss_sum, count


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Loss of each token [N] in nats, 0 where the label is -100; no gradient. Arguments as above."""
    losses = hidden.new_zeros(len(hidden), dtype=_softmax_dtype(hidden))
    chunk, product_dtype = default_chunk(len(weight)), _product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, logits in _logits_by_chunk(hidden.to(product_dtype), weight.to(product_dtype), chunk):
            losses[part] = _softmax_in_place(logits, labels[part])
    return losses


def default_chunk(vocabulary: int) -> int:
    """Tokens whose float32 logits take at most 64 MiB; 256 at least, below which the products get slow."""
    return max(MIN_CHUNK, CHUNK_BYTES // (4 * vocabulary))


@torch.library.custom_op("lmtrain::linear_cross_entropy", mutates_args=())
def _chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    product_dtype: torch.dtype,
    hidden_learns: bool,
    weight_learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss sum, its gradient by hidden, by weight); a gradient that nobody wants is empty."""
    loss_sum = hidden.new_zeros((), dtype=_softmax_dtype(hidden))
    hidden_grad = torch.empty_like(hidden if hidden_learns else hidden[:0])
    weight_grad = torch.zeros_like(weight if weight_learns else weight[:0], dtype=loss_sum.dtype)
    rows, columns = hidden.to(product_dtype), weight.to(product_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, logits in _logits_by_chunk(rows, columns, chunk):
            loss_sum += _softmax_in_place(logits, labels[part]).sum()
            if hidden_learns or weight_learns:
                logits_grad = _minus_one_hot(logits, labels[part]).to(product_dtype)
            if hidden_learns:
                hidden_grad[part] = logits_grad @ columns
            if weight_learns:
                _add_product(weight_grad, logits_grad.T, rows[part])
    return loss_sum, hidden_grad, weight_grad.to(weight.dtype)


@_chunked.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    product_dtype: torch.dtype,
    hidden_learns: bool,
    weight_learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=_softmax_dtype(hidden)),
        torch.empty_like(hidden if hidden_learns else hidden[:0]),
        torch.empty_like(weight if weight_learns else weight[:0]),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.learns = inputs[-2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _scale_gradients(ctx: Any, loss_grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    wanted = (learns and loss_grad is not None for learns in ctx.learns)
    scaled = (grad * loss_grad if yes else None for grad, yes in zip(ctx.saved_tensors, wanted))
    return *scaled, None, None, None, None, None


_chunked.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@register_flop_formula(torch.ops.lmtrain.linear_cross_entropy)
def _flops(
    hidden_shape: torch.Size,
    weight_shape: torch.Size,
    labels_shape: torch.Size,
    chunk: int,
    product_dtype: torch.dtype,
    hidden_learns: bool,
    weight_learns: bool,
    **unused: Any,
) -> int:
    return 2 * hidden_shape.numel() * weight_shape[0] * (1 + hidden_learns + weight_learns)


def _logits_by_chunk(rows: Tensor, columns: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, their logits [C, V] in float32 or better), in memory that the next chunk overwrites.

    One buffer, because a fresh one costs its page faults: a fifth of the product on a CPU.
    """
    buffer = rows.new_empty(min(chunk, len(rows)), len(columns), dtype=_softmax_dtype(rows))
    for start in range(0, len(rows), chunk):
        part = slice(start, min(start + chunk, len(rows)))
        logits = buffer[: part.stop - start]
        if rows.dtype == logits.dtype:
            torch.mm(rows[part], columns.T, out=logits)
        else:
            logits.copy_(rows[part] @ columns.T)
        yield part, logits


def _softmax_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses [C] of a chunk, whose logits [C, V] become probabilities in place, 0 where nothing is scored."""
    scored = labels != IGNORE
    logits.sub_(logits.amax(-1, keepdim=True))
    target = logits.gather(1, labels.where(scored, 0)[:, None])[:, 0]
    total = logits.exp_().sum(-1)
    logits.div_(total.where(scored, torch.inf)[:, None])
    return (total.log() - target).where(scored, 0)


def _minus_one_hot(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Turns the probabilities [C, V] of a chunk into the gradient of its logits, in place."""
    scored = labels != IGNORE
    ones = -scored[:, None].to(probabilities.dtype)
    return probabilities.scatter_add_(1, labels.where(scored, 0)[:, None], ones)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the factors may be of lower precision than the total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x: autocast's if it is on, which leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
