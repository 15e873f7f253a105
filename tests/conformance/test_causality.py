"""Points 2, 3 and 4: no later token changes an earlier output; a mixer that leaks is caught by each."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from attention.mixer import MIXERS, Context, Cost, Mixer, MixerOutput, build, register
from lmtrain.config import ModelConfig
from tests.conformance.checks import check_entropy_floor, check_future, check_prefixes
from tests.conformance.oracle import Subject
from tests.conformance.sequences import train_a_little


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
def test_the_future_changes_nothing(subject: Subject, training: bool, trained: bool) -> None:
    mixer = subject.mixer()
    if trained:
        train_a_little(mixer, subject.case.dim)
    check_future(mixer.train(training), subject.case.dim, 17, subject.rounding)


def test_the_future_changes_nothing_over_many_tiles(subject: Subject) -> None:
    cuts = [1, 64, 65, 127, 128, 129, 192, 250]
    check_future(subject.mixer(), subject.case.dim, 300, subject.rounding, cuts)


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
def test_a_prefix_is_enough(subject: Subject, trained: bool) -> None:
    mixer = subject.mixer()
    if trained:
        train_a_little(mixer, subject.case.dim)
    check_prefixes(mixer, subject.case.dim, 35)


def noise_model(kind: str, dim: int, settings: dict) -> ModelConfig:
    """Two layers of one mixer over four tokens."""
    mixers = {"it": {"kind": kind, **settings}}
    return ModelConfig(dim=dim, layers=2, ffn_dim=64, vocab_size=4, mixers=mixers, pattern="it")


@pytest.mark.slow
def test_noise_stays_unpredictable(typical: Subject) -> None:
    check_entropy_floor(noise_model(typical.kind, typical.case.dim, typical.case.settings), steps=300)


# A check that cannot fail proves nothing: here is a mixer that leaks as whole-sequence selection does.


@dataclass
class PairChoiceConfig:
    """No settings."""

    def problems(self, dim: int) -> list[tuple[str, str]]:
        return []


class PairChoice(Mixer):
    """Of every two neighbours (0, 1), (2, 3), .. only the one that scores higher is processed: expert choice.

    The earlier of the two learns how the later one scores, through a choice whose gradient is zero.
    """

    Config = PairChoiceConfig

    def __init__(self, dim: int, config: PairChoiceConfig) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim, bias=False)
        self.router = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor, ctx: Context | None = None, state: None = None) -> MixerOutput:
        score = self.router(x)[..., 0]
        padded = nn.functional.pad(score, (0, score.shape[1] % 2), value=-torch.inf).unflatten(1, (-1, 2))
        chosen = (padded >= padded.amax(2, keepdim=True)).flatten(1)[:, : score.shape[1], None]
        return MixerOutput(self.value(x) * chosen, {})

    def init_state(self, batch: int, limit: int | None = None) -> None:
        raise ValueError("a choice that sees ahead has no state")

    def cost(self, length: int) -> Cost:
        return Cost(0, 0, 0, 0)


@pytest.fixture
def leaky() -> Iterator[str]:
    """The name of a registered mixer that leaks."""
    register("pair_choice")(PairChoice)
    yield "pair_choice"
    del MIXERS["pair_choice"]


def test_a_leak_has_no_gradient(leaky: str) -> None:
    x = torch.randn(1, 8, 6, requires_grad=True)
    y = build(leaky, 6)(x).y
    (to_input,) = torch.autograd.grad(y[:, :5].sum(), x)
    assert not to_input[:, 5:].any()


def test_a_leak_is_caught_by_its_future(leaky: str) -> None:
    with pytest.raises(AssertionError, match=r"tokens from \d+ on change an earlier output"):
        check_future(build(leaky, 6).double(), 6, 17)


def test_a_leak_is_caught_by_its_prefixes(leaky: str) -> None:
    with pytest.raises(AssertionError, match=r"a prefix of \d+ tokens ends"):
        check_prefixes(build(leaky, 6).double(), 6, 17)


@pytest.mark.slow
def test_a_leak_is_caught_by_noise(leaky: str) -> None:
    with pytest.raises(AssertionError, match="lies below ln 4"):
        check_entropy_floor(noise_model(leaky, 48, {}), steps=300)
