"""What "no later token changes an earlier output" means, as checks that raise AssertionError.

Gradients show no leak of a selection: they are zero through a discrete choice. Only changed inputs do.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from attention.mixer import Mixer
from lmtrain.config import ModelConfig
from lmtrain.model import DecoderLM
from tests.conformance.sequences import Tokens, largest_difference


@torch.no_grad()
def check_future(mixer: Mixer, dim: int, length: int, rounding: float = 0.0, cuts: Iterable[int] | None = None) -> None:
    """Point 2: whatever stands from a cut on, nothing before it changes; every cut unless given, two futures.

    One of them is a hundred times larger, so that it wins every choice that it takes part in.
    """
    tokens = Tokens.random(2, length, dim)
    y = tokens.run(mixer)
    other = Tokens.random(2, length, dim, seed=2)
    for future in (other, Tokens(100.0 * other.vectors)):
        for cut in range(1, length) if cuts is None else cuts:
            changed = tokens.then(future, cut).run(mixer)
            difference = largest_difference(changed[:, :cut], y[:, :cut])
            assert difference <= rounding, f"tokens from {cut} on change an earlier output by {difference:.1e}"


@torch.no_grad()
def check_prefixes(mixer: Mixer, dim: int, length: int) -> None:
    """Point 3: the last output of every prefix is that of the whole pass."""
    tokens = Tokens.random(2, length, dim)
    y = tokens.run(mixer)
    for stop in range(1, length + 1):
        last = tokens.part(0, stop).run(mixer)[:, -1]
        difference = largest_difference(last, y[:, stop - 1])
        assert difference < 1e-12, f"a prefix of {stop} tokens ends {difference:.1e} off the one pass"


VOCABULARY, LENGTH = 4, 32


def check_entropy_floor(config: ModelConfig, steps: int) -> tuple[float, float]:
    """Point 4: nobody predicts independent uniform tokens better than by chance, who does not see them.

    Trains a model of `config` on fresh tokens; returns its loss (nats per token) on 4,096 other sequences and
    the standard error of that mean over sequences.
    """
    model = train_on_noise(config, steps)
    loss, error = loss_on_noise(model)
    floor = math.log(VOCABULARY)
    assert loss >= floor - 3 * error - 1e-6, f"loss {loss:.4f} +- {error:.4f} lies below ln {VOCABULARY} = {floor:.4f}"
    return loss, error


def train_on_noise(config: ModelConfig, steps: int) -> DecoderLM:
    """A model trained on independent uniform tokens, 64 fresh sequences a step."""
    torch.manual_seed(0)
    model = DecoderLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (64, LENGTH + 1))
        total, count, losses = model.loss(tokens[:, :-1], tokens[:, 1:])
        (total / count + sum(losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        schedule.step()
    return model


@torch.no_grad()
def loss_on_noise(model: DecoderLM) -> tuple[float, float]:
    """Mean loss per token over 4,096 sequences never seen, and its standard error."""
    model.eval()
    tokens = torch.randint(VOCABULARY, (4096, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    means = []
    for part in tokens.split(512):
        logits = model(part[:, :-1]).double()
        means.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").mean(1))
    mean = torch.cat(means)
    return float(mean.mean()), float(mean.std() / len(mean) ** 0.5)
