"""The audit tells a leak from rounding, and says which layer has it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from attention.mixer import MIXERS, Causality, Context, Cost, Mixer, MixerOutput, register
from lmtrain.audit import Finding, _copy, audit
from lmtrain.config import ModelConfig
from lmtrain.model import DecoderLM


@dataclass
class TopConfig:
    """How much of the sequence is processed, and what is said about it."""

    honest: bool = False

    def problems(self, dim: int) -> list[tuple[str, str]]:
        return []


class Top(Mixer):
    """Only the half of all positions with the highest scores is processed: it sees ahead without gradient."""

    Config = TopConfig

    def __init__(self, dim: int, config: TopConfig) -> None:
        super().__init__()
        self.causality: Causality = "selects_ahead" if config.honest else "strict"
        self.router = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor, ctx: Context | None = None, state: None = None) -> MixerOutput:
        if self.causality == "selects_ahead" and ctx is not None and ctx.positions is not None:
            raise ValueError("no packed documents")
        score = self.router(x)[..., 0]
        return MixerOutput(x * (score >= score.median(1, keepdim=True).values)[..., None], {})

    def init_state(self, batch: int, limit: int | None = None) -> None:
        raise ValueError("no state")

    def cost(self, length: int) -> Cost:
        return Cost(0, 0, 0, 0)


class Mean(Top):
    """The mean of all rows of the batch: rows see each other, the future does not matter."""

    def forward(self, x: Tensor, ctx: Context | None = None, state: None = None) -> MixerOutput:
        return MixerOutput(x.mean(0, keepdim=True).expand_as(x), {})


class Forgetful(Top):
    """Adds up the past without regard to documents."""

    def forward(self, x: Tensor, ctx: Context | None = None, state: None = None) -> MixerOutput:
        return MixerOutput(x.cumsum(1), {})


class Rounding(Top):
    """Adds and takes away something large from later tokens: nothing but rounding remains."""

    def forward(self, x: Tensor, ctx: Context | None = None, state: None = None) -> MixerOutput:
        later = x.flip(1).cumsum(1).flip(1)
        return MixerOutput(x + later - later, {})


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    """Mixers that misbehave, each in its own way."""
    added = {"top": Top, "mean": Mean, "forgetful": Forgetful, "rounding": Rounding}
    for name, cls in added.items():
        register(name)(cls)
    yield
    for name in added:
        del MIXERS[name]


def model(pattern: str, **settings: object) -> DecoderLM:
    """Toys are called by their kind, `near` is a window of 8."""
    torch.manual_seed(0)
    mixers = {name: {"kind": name, **settings} for name in ("top", "mean", "forgetful", "rounding")}
    mixers["near"] = {"kind": "local", "heads": 2, "window": 8}
    return DecoderLM(
        ModelConfig(dim=16, layers=len(pattern.split()), vocab_size=23, ffn_dim=32, mixers=mixers, pattern=pattern)
    )


def test_a_strict_model_passes_bit_for_bit() -> None:
    report = audit(model("near near"), length=33)
    assert not report.leaks
    assert report.verdict == "strict: no later token changes an earlier output"
    assert [layer.future.worst for layer in report.layers] == [0.0, 0.0]
    assert report.future.worst == 0.0
    assert report.layers[0].future.compared > 200
    assert report.precision == "float64"
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["leaks"] is False


def test_a_leak_is_charged_to_its_layer() -> None:
    report = audit(model("near near+top near"), length=33)
    assert report.leaks
    assert report.verdict.startswith("LEAK: layer 1 top, the model's future, prefixes")
    assert [(a.layer, a.name, a.leaks) for a in report.layers] == [
        (0, "near", False),
        (1, "near", False),
        (1, "top", True),
        (2, "near", False),
    ]
    found = report.layers[2].future
    assert 0 < found.changed < found.compared
    assert found.where.startswith("cut ")
    assert "LEAK" in report.format()
    assert report.to_json()["layers"][2]["leaks"] is True


def test_who_says_that_it_looks_ahead_does_not_lie() -> None:
    report = audit(model("near top", honest=True), length=33)
    assert not report.leaks
    assert report.verdict.startswith("selects ahead, as configured")
    assert report.layers[1].verdict.startswith("selects ahead, as configured")
    assert report.layers[1].future.leaks
    assert report.documents is None
    assert report.to_json()["documents"] is None
    assert "refused" in report.format()


def test_a_strict_mixer_that_leaks_beside_an_honest_one_is_found() -> None:
    settings = {"honest": {"kind": "top", "honest": True}, "liar": {"kind": "top"}}
    config = ModelConfig(dim=16, layers=2, vocab_size=23, ffn_dim=32, mixers=settings, pattern="honest liar")
    report = audit(DecoderLM(config), length=33)
    assert report.verdict == "LEAK: layer 1 liar"


def test_rows_that_meet_are_a_leak() -> None:
    report = audit(model("mean"), length=20)
    assert report.rows.leaks
    assert "rows of a batch" in report.verdict


def test_documents_that_meet_are_a_leak() -> None:
    report = audit(model("forgetful"), length=20)
    assert report.documents is not None
    assert report.verdict == "LEAK: packed documents"


def test_rounding_is_called_rounding() -> None:
    report = audit(model("rounding"), length=40)
    assert 0 < report.layers[0].future.worst < 1e-12
    assert not report.leaks
    assert "rounding" in report.layers[0].verdict


def test_a_change_that_is_not_a_number_is_a_change() -> None:
    expected = torch.ones(1, 2, 3)
    got = expected.clone()
    got[0, 1] = torch.nan
    found = Finding().also(got, expected, "here")
    assert (found.leaks, found.changed, found.compared, found.where) == (True, 1, 2, "here")


def test_real_tokens_are_audited_too() -> None:
    """Scores that never change the choice among random tokens may do so among others."""

    class Seventh(Top):
        """Where token 7 follows, the output differs; random tokens below 5 never show it."""

        def forward(self, x: Tensor, ctx: Context | None = None, state: None = None) -> MixerOutput:
            assert ctx is not None
            assert ctx.initial is not None
            follows = (ctx.initial[:, 1:] - seventh).abs().sum(-1) < 1e-9
            return MixerOutput(x * (1 + nn.functional.pad(follows, (0, 1)).to(x))[..., None], {})

    MIXERS["top"] = Seventh
    leaky = model("top")
    row = leaky.embedding.weight[7].detach().double()
    seventh = row / (row.square().mean() + torch.finfo(torch.float64).eps).sqrt()
    assert not audit(leaky, length=20, vocab=5).leaks
    real = torch.randint(23, (2, 30))
    real[:, ::3] = 7
    report = audit(leaky, length=20, vocab=5, tokens=real)
    assert report.leaks
    assert "real tokens" in report.layers[0].future.where


def test_the_model_is_left_as_it_was() -> None:
    audited = model("near").train()
    before = {name: value.clone() for name, value in audited.state_dict().items()}
    random = torch.get_rng_state()
    audit(audited, length=9)
    assert torch.equal(torch.get_rng_state(), random)
    assert audited.training
    assert all(torch.equal(value, before[name]) for name, value in audited.state_dict().items())
    assert not any(mixer._forward_hooks for mixer in audited.modules())


def test_dropout_is_no_leak() -> None:
    dropping = model("near")
    for module in dropping.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert audit(dropping, length=12).future.worst == 0.0


@pytest.mark.parametrize(("length", "tokens"), [(1, None), (9, torch.zeros(1, 9)), (9, torch.zeros(2, 8))])
def test_what_cannot_be_audited_is_refused(length: int, tokens: Tensor | None) -> None:
    with pytest.raises(ValueError, match="an audit needs"):
        audit(model("near"), length=length, tokens=tokens)


def test_two_tokens_are_enough() -> None:
    assert not audit(model("near"), length=2).leaks


def test_the_copy_keeps_the_tags_of_parameters() -> None:
    tags = [getattr(p, "residual_output", False) for p in _copy(model("near")).parameters()]
    assert any(tags)
    assert tags == [getattr(p, "residual_output", False) for p in model("near").parameters()]
