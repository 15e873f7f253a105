"""What "no later token changes an earlier output" means, as checks that raise AssertionError.

Gradients show no leak of a selection: they are zero through a discrete choice. Only changed inputs do.
"""

from collections.abc import Iterable

import torch

from attention.mixer import Mixer
from lmtrain.config import ModelConfig
from lmtrain.floor import FloorReport, experiment, trial
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


def check_entropy_floor(config: ModelConfig, steps: int) -> FloorReport:
    """Point 4: nobody predicts independent uniform tokens better than by chance, who does not see them."""
    report = trial(experiment(config, steps))
    loss, error = report.one_pass.mean, report.one_pass.standard_error
    assert not report.below, f"loss {loss:.4f} +- {error:.4f} lies below ln {report.vocabulary} = {report.floor:.4f}"
    return report
