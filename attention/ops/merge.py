"""Merging attention over disjoint sets of keys into attention over their union, exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the `(out, lse)` of each.

    out [..., Nq, Dv], lse [..., Nq] natural log -> (out in the parts' type, lse). With L = logsumexp of the lse:
    out = sum of exp(lse_i - L) out_i, computed in at least float32, differentiable in all parts. A query that
    meets nobody in any part (all lse -inf) gets (0, -inf) and zero gradients. Raises ValueError where the shapes
    of the parts differ.
    """
    if not parts:
        raise ValueError("parts: expected at least one (out, lse), got none")
    for i, (out, lse) in enumerate(parts):
        if out.shape != parts[0][0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"parts[{i}]: expected shapes {tuple(parts[0][0].shape)} and {tuple(parts[0][1].shape)} "
                f"as in parts[0], got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    wide = torch.promote_types(torch.promote_types(parts[0][0].dtype, parts[0][1].dtype), torch.float32)
    lses = torch.stack([lse for _, lse in parts]).to(wide)
    # Never -inf - -inf: a row without keys is shifted by 0, then every weight is exp(-inf) = 0.
    top = lses.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    shares = (weights / total)[..., None]
    merged = parts[0][0].to(wide) * shares[0]
    for share, (out, _) in zip(shares[1:], parts[1:], strict=True):
        merged.addcmul_(out.to(wide), share)
    lse = (total.log() + top).masked_fill(empty, -torch.inf)
    return merged.to(parts[0][0].dtype), lse
