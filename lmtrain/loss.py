"""Cross entropy of a linear head, without ever holding the logits of a whole sequence.

Shapes: N tokens, d features, V vocabulary, C tokens of one chunk. Losses are in nats, sums over tokens:
whoever accumulates micro-batches divides by the count of the whole batch once.

The gradient of a chunk's logits is its probabilities minus the labels' one-hot rows, known as soon as its
logits are. So the forward finishes both gradients chunk by chunk (three products of 2 N d V flops in all, as
many as plain autograd needs), and the backward only scales them: logits and probabilities take 2 C V numbers
in place of some 3 N V.

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
FEW_LOGITS = 2**22  # 16 MiB in float32. Plain cross entropy takes 5 to 40 % less time up to there [CPU, 1 thread]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(hidden @ weight.T)[label] over the scored tokens, and their number.

    hidden [N, d], weight [V, d] (it may be the embedding's), labels [N] int64, of which -100 is not scored.
    Returns (loss_sum, count): a scalar in nats, float32 (float64 for float64 inputs), and a 0-dim int64.
    `chunk` tokens are done at a time, by default `default_chunk(V)`; where N V is small, all at once.

    Under `torch.autocast` the products run in its dtype; softmax, loss and the gradient of `weight`, summed
    over chunks, are float32 whatever the inputs are. Differentiable once.
    """
    assert hidden.ndim == weight.ndim == 2, "hidden [N, d], weight [V, d]"
    assert labels.shape == hidden.shape[:1], "labels [N]"
    count = (labels != IGNORE).sum()
    if chunk is None and len(hidden) * len(weight) <= FEW_LOGITS:
        logits = F.linear(hidden, weight).to(_softmax_dtype(hidden))
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), count
    chunk = default_chunk(len(weight)) if chunk is None else chunk
    hidden_learns, weight_learns = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    loss_sum, _, _ = _linear_cross_entropy(
        hidden, weight, labels, chunk, _product_dtype(hidden), hidden_learns, weight_learns
    )
    return loss_sum, count


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Loss of each token [N] in nats, 0 where the label is -100; no gradient. Arguments as above."""
    losses = hidden.new_empty(len(hidden), dtype=_softmax_dtype(hidden))
    dtype = _product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, of_part, _ in _chunks(hidden.to(dtype), weight.to(dtype), labels, default_chunk(len(weight))):
            losses[part] = of_part
    return losses


def default_chunk(vocabulary: int) -> int:
    """Tokens whose float32 logits and probabilities take 64 MiB, at least 256: fewer slow the products."""
    return max(MIN_CHUNK, CHUNK_BYTES // (2 * 4 * vocabulary))


@torch.library.custom_op("lmtrain::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
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
        for part, losses, probabilities in _chunks(rows, columns, labels, chunk):
            loss_sum += losses.sum()
            if hidden_learns or weight_learns:
                logits_grad = _logits_gradient(probabilities, labels[part]).to(product_dtype)
            if hidden_learns:
                hidden_grad[part] = logits_grad @ columns
            if weight_learns:
                _add_product(weight_grad, logits_grad.T, rows[part])
    return loss_sum, hidden_grad, weight_grad.to(weight.dtype)


@_linear_cross_entropy.register_fake
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


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


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


def _chunks(rows: Tensor, columns: Tensor, labels: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(tokens, their losses [C], their probabilities [C, V]) in turn, float32 or better.

    The probabilities lie where the next chunk's will. Two buffers serve all chunks, because fresh ones cost
    their page faults, on a CPU a fifth of the product. The log of the normaliser is read off the largest
    probability, which is never small: so the exponentials are taken once, by one softmax.
    """
    shape = (2, min(chunk, len(rows)), len(columns))
    buffers = rows.new_empty(shape, dtype=_softmax_dtype(rows))
    for start in range(0, len(rows), chunk):
        part = slice(start, min(start + chunk, len(rows)))
        logits, probabilities = buffers[:, : part.stop - start]
        _product(rows[part], columns.T, out=logits)
        torch.softmax(logits, -1, out=probabilities)
        losses = logits.amax(-1) - logits.gather(1, _target(labels[part]))[:, 0] - probabilities.amax(-1).log()
        yield part, losses.where(labels[part] != IGNORE, 0), probabilities


def _logits_gradient(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Turns the probabilities [C, V] of a chunk into the gradient of its logits, in place."""
    target = _target(labels)
    probabilities.scatter_add_(1, target, -torch.ones_like(target, dtype=probabilities.dtype))
    return probabilities.masked_fill_((labels == IGNORE)[:, None], 0)


def _target(labels: Tensor) -> Tensor:
    """Where each label stands in its row [C, 1]; anywhere for those that are not scored."""
    return labels.where(labels != IGNORE, 0)[:, None]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, where the factors may be of lower precision than `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


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
