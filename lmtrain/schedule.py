"""The learning rate of every optimizer step, a pure function of (step, steps, settings).

Nothing is remembered between steps, so a resumed run, and a fork that goes on from step s with another
`steps` or `schedule`, needs no state: it asks for the same function's value.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmtrain.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of the update that follows `step` finished ones; a run asks for step 0 .. steps - 1.

    Warm-up is W = round(warmup * steps) steps, of which step s takes lr * (s + 1) / (W + 1): never 0, and the
    peak is first reached at step W. From there, by `config.schedule`:

    * constant: the peak;
    * cosine: lr falls along half a cosine, to `final` * lr at `steps` (nanoGPT's formula and off-by-one, with
      `lr_decay_iters` = steps);
    * wsd: the peak, until the last round(decay * steps) steps (fewer if warm-up is not over) fall as 1 - sqrt
      to `final` * lr at `steps` (Hagele et al., arXiv 2405.18392).

    `steps` itself is where the curve ends, not a step that is taken; later steps stay at that value.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    decay_steps = steps if config.schedule == "cosine" else round(config.decay * steps)
    start = max(warmup, steps - decay_steps)
    if step < start:
        return config.lr
    progress = (step - start) / (steps - start) if step < steps else 1.0
    shape = _half_cosine if config.schedule == "cosine" else _one_minus_sqrt
    end = config.final * config.lr
    return end + (config.lr - end) * shape(progress)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _one_minus_sqrt(progress: float) -> float:
    return 1 - math.sqrt(progress)
