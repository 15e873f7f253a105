"""Several token budgets for one model: a run for each, or short cool-downs from the checkpoints of one trunk.

With warm-up, stable, decay the rate of a run is that of every longer one until its own decay begins. So one trunk
trains at the peak rate as far as the longest run needs it, in parts that end where a cool-down begins, and each budget
is a fork that trains the last share alone (Hagele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lmtrain.config import Config


@dataclass(frozen=True)
class Stage:
    """A piece of training. tokens: the budget that it ends at, None for a part of the trunk; parent: index of the stage
    whose last checkpoint it begins with."""

    config: Config
    changes: tuple[str, ...]
    tokens: int | None
    parent: int | None = None


def stages(config: Config, tokens: tuple[int, ...], cooldown: float | None) -> list[Stage]:
    """The stages of one combination, parents first. ValueError if the budgets leave no room for the cool-downs.

    tokens: rising, each rounded to whole steps.
    """
    if not tokens:
        return [Stage(config, (), config.train.steps * config.train.batch_tokens)]
    steps = [max(1, round(budget / config.train.batch_tokens)) for budget in tokens]
    if len(set(steps)) < len(steps):
        raise ValueError(f"tokens: two of them are {min(s for s in steps if steps.count(s) > 1)} steps")
    if cooldown is None:
        return [_stage(config, count, {}, count * config.train.batch_tokens) for count in steps]
    return _forks(config, steps, cooldown)


def _forks(config: Config, steps: list[int], cooldown: float) -> list[Stage]:
    starts = [count - round(cooldown * count) for count in steps]
    warmup = round(config.optimizer.warmup * steps[0])
    if any(start == count for start, count in zip(starts, steps)) or starts[0] < max(1, warmup):
        raise ValueError(
            f"cooldown: {steps[0]} steps, of which {warmup} warm up, leave no room for a decay of {cooldown:g} of them"
        )
    found: list[Stage] = []
    trunk: int | None = None
    for start, count in zip(starts, steps):
        stable = {"warmup": warmup / start, "decay": 0.0}
        found.append(_stage(config, start, stable, None, trunk))
        trunk = len(found) - 1
        decaying = {"warmup": warmup / count, "decay": cooldown}
        found.append(_stage(config, count, decaying, count * config.train.batch_tokens, trunk))
    return found


def _stage(config: Config, steps: int, rate: dict[str, float], tokens: int | None, parent: int | None = None) -> Stage:
    """`steps` of the configuration; rate: shares of the steps that warm up and decay, if it is to be wsd."""
    changes = [f"train.steps={steps}"]
    changed = replace(config, train=replace(config.train, steps=steps))
    if rate:
        changes += ["optimizer.schedule=wsd", *(f"optimizer.{name}={value!r}" for name, value in rate.items())]
        changed = replace(changed, optimizer=replace(config.optimizer, schedule="wsd", **rate))  # type: ignore[arg-type]
    return Stage(changed, tuple(changes), tokens, parent)
