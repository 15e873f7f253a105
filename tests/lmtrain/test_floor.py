"""The floor trial: what it trains, what it scores, what it concludes; the published selection falls, the strict not."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention.mixer import MIXERS, Context, Cost, Mixer, MixerOutput, register
from launch.cli import main
from lmtrain import floor
from lmtrain.config import Config, ModelConfig, load
from lmtrain.floor import (
    LENGTH,
    Estimate,
    FloorReport,
    experiment,
    letters,
    one_pass_losses,
    prefix_wise_losses,
    scaled,
    share_met,
    trial,
    trial_of,
)
from lmtrain.model import DecoderLM
from tests.documents import loadable_configs

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class NextConfig:
    """What is claimed."""

    honest: bool = False

    def problems(self, dim: int) -> list[tuple[str, str]]:
        return []


class Next(Mixer):
    """Gives away the next token, as far as there is one."""

    Config = NextConfig

    def __init__(self, dim: int, config: NextConfig) -> None:
        super().__init__()
        self.causality = "selects_ahead" if config.honest else "strict"
        self.value = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, ctx: Context | None = None, state: None = None) -> MixerOutput:
        return MixerOutput(self.value(nn.functional.pad(x[:, 1:], (0, 0, 0, 1))), {})

    def init_state(self, batch: int, limit: int | None = None) -> None:
        raise ValueError("no state")

    def cost(self, length: int) -> Cost:
        return Cost(0, 0, 0, 0)


@pytest.fixture
def cheat() -> Iterator[str]:
    """The name of a mixer that sees the next token."""
    register("next")(Next)
    yield "next"
    del MIXERS["next"]


def small(kind: str, **settings: Any) -> Config:
    """A narrow model of one mixer."""
    mixers = {"it": {"kind": kind, **settings}}
    return experiment(ModelConfig(dim=16, layers=1, ffn_dim=16, vocab_size=4, mixers=mixers, pattern="it"), steps=40)


def test_who_sees_the_next_token_falls_through_the_floor(cheat: str) -> None:
    report = trial(small(cheat), sequences=64)
    assert report.leaks
    assert report.one_pass.mean < math.log(4) - 0.5
    assert report.verdict.startswith("LEAK: below the floor: -")
    assert "LEAK" in report.format()


def test_who_says_so_is_told_how_far_and_scored_prefix_by_prefix(cheat: str) -> None:
    report = trial(small(cheat, honest=True), sequences=64)
    assert (report.below, report.leaks) == (True, False)
    assert report.verdict.startswith("reads ahead, as configured: -")
    assert report.prefix_wise is not None
    assert report.prefix_wise.mean > math.log(4)
    assert "prefix by prefix, 64 sequences" in report.format()
    row = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert row["prefix_wise"]["mean"] == report.prefix_wise.mean
    assert (row["below"], row["leaks"], row["floor"]) == (True, False, math.log(4))


def test_who_sees_nothing_stays_above() -> None:
    report = trial(small("dense", heads=2), sequences=64)
    assert (report.below, report.prefix_wise) == (False, None)
    assert report.verdict.startswith("strict: not below the floor: +")
    assert report.one_pass.mean < math.log(4) + 0.1
    assert "prefix by prefix" not in report.format()


def test_a_trial_repeats_bit_for_bit_and_leaves_the_random_state_of_nobody_else_in_it() -> None:
    first = trial(small("dense", heads=2), sequences=16)
    torch.rand(7)
    assert trial(small("dense", heads=2), sequences=16) == first
    other = dataclasses.replace(small("dense", heads=2), run=dataclasses.replace(small("dense").run, seed=2))
    assert trial(other, sequences=16).one_pass != first.one_pass


def test_every_step_reads_fresh_letters_and_none_that_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def recorded(*arguments: Any) -> Tensor:
        drawn.append(letters(*arguments))
        return drawn[-1]

    monkeypatch.setattr(floor, "letters", recorded)
    trial(small("dense", heads=2), sequences=4096)
    *train, scored = drawn
    assert [tuple(tokens.shape) for tokens in train] == [(64, LENGTH + 1)] * 40
    assert scored.shape == (4096, LENGTH + 1)
    sequences = [tuple(sequence) for sequence in torch.cat(drawn).tolist()]
    assert len(set(sequences)) == len(sequences)
    counts = torch.bincount(torch.cat(drawn).flatten(), minlength=4)
    assert len(counts) == 4
    assert (counts / counts.sum() - 0.25).abs().max() < 0.005


def test_losses_by_hand() -> None:
    torch.manual_seed(0)
    mixers = {"it": {"kind": "mosa", "heads": 2, "head_dim": 4, "keep": 3, "selection": "paper"}}
    config = ModelConfig(dim=8, layers=2, ffn_dim=8, vocab_size=4, mixers=mixers, pattern="it", init_std=0.9)
    model = DecoderLM(config).double().eval()
    tokens = letters(4, 3, 12, torch.Generator().manual_seed(5))
    whole, alone = one_pass_losses(model, tokens), prefix_wise_losses(model, tokens)
    logits = model(tokens[:, :-1]).detach()
    for row in range(3):
        for place in range(12):
            expected = -logits[row, place].log_softmax(-1)[tokens[row, place + 1]]
            assert whole[row, place] == pytest.approx(float(expected), abs=1e-12)
            prefix = model(tokens[row : row + 1, : place + 1])[0, -1].detach()
            expected = -prefix.log_softmax(-1)[tokens[row, place + 1]]
            assert alone[row, place] == pytest.approx(float(expected), abs=1e-12)
    assert (whole[:, -1] - alone[:, -1]).abs().max() < 1e-12
    assert (whole - alone).abs().max() > 1e-3


def test_the_standard_error_is_that_of_sequences_not_of_tokens() -> None:
    """Tokens of a sequence that are all alike are one observation."""
    means = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    estimate = Estimate.of(means[:, None].expand(4, 100))
    assert estimate == Estimate(3.0, pytest.approx(math.sqrt(10 / 3 / 4)))


def test_below_is_more_than_chance() -> None:
    report = FloorReport("strict", "", 4, 32, 1, 1, Estimate(math.log(4), 0.01), (), None)
    cases = ((-0.029, False), (-0.031, True), (0.1, False))
    for distance, below in cases:
        changed = dataclasses.replace(report, one_pass=Estimate(math.log(4) + distance, 0.01))
        assert changed.below is changed.leaks is below
    exact = dataclasses.replace(report, one_pass=Estimate(math.log(4) - 1e-9, 0.0))
    assert not exact.below  # a constant prediction, and rounding


def test_quarters_are_those_of_the_sequence(cheat: str) -> None:
    """The last token has no next one to be given away, so the last quarter is the worst."""
    report = trial(small(cheat), sequences=64)
    assert len(report.quarters) == 4
    assert sum(quarter.mean for quarter in report.quarters) / 4 == pytest.approx(report.one_pass.mean, abs=1e-12)
    assert report.quarters[3].mean > max(quarter.mean for quarter in report.quarters[:3]) + 0.05


class TestTrialOf:
    """The trial of a user's configuration."""

    def test_each_word_of_the_pattern_is_a_layer(self) -> None:
        config, changes = trial_of(load("demo"), steps=7)
        assert (config.model.pattern, config.model.layers) == ("near far", 2)
        assert (config.train.steps, config.data.seq_len, config.model.vocab_size) == (7, LENGTH, 4)
        assert config.model.mixers["near"]["window"] == 8
        assert changes == ("near.window 128 -> 8",)
        side, _ = trial_of(load("enwik8/mosa"))
        assert (side.model.pattern, side.model.layers) == ("near+far", 2)
        three, _ = trial_of(load("demo", ["model.pattern=near far near+far far"]))
        assert (three.model.pattern, three.model.layers) == ("near far near+far", 3)

    def test_the_rest_of_the_model_is_the_users(self) -> None:
        config, _ = trial_of(load("shakespeare", ["model.dropout=0.1", "run.seed=9"]))
        model = config.model
        assert (model.norm, model.ffn, model.tied, model.init_std) == ("layernorm", "gelu", True, 0.02)
        assert (model.learned_positions, model.dropout, config.run.seed) == (LENGTH, 0.0, 9)

    @pytest.mark.parametrize(
        ("mixer", "changed"),
        [
            ({"kind": "mosa", "keep": 8}, {}),
            ({"kind": "mosa", "keep": 31}, {}),
            ({"kind": "mosa", "keep": 32}, {"keep": 8}),
            ({"kind": "mosa", "keep": 500, "heads": 64}, {"keep": 7}),
            ({"kind": "local", "window": 31}, {}),
            ({"kind": "sparse", "block": 128, "columns": 32}, {"block": 8, "columns": 2}),
            ({"kind": "sparse", "block": 128, "columns": 1}, {"block": 8}),
            ({"kind": "routing", "window": 256, "clusters": 16}, {}),  # a cluster is less than all
            ({"kind": "routing", "window": 256, "clusters": 16, "selection": "paper"}, {"window": 16}),
            ({"kind": "dense", "heads": 32}, {}),
            ({"kind": "moh"}, {}),
        ],
    )
    def test_what_would_meet_everything_is_scaled(self, mixer: dict, changed: dict) -> None:
        mixer = {"kind": mixer["kind"]} | dataclasses.asdict(MIXERS[mixer.pop("kind")].Config(**mixer))
        assert scaled(mixer, 256) == mixer | changed

    @pytest.mark.parametrize("heads", [1, 5, 16, 24])
    def test_as_narrow_as_the_settings_allow(self, heads: int) -> None:
        mixers = f"model.mixers={{it: {{kind: dense, heads: {heads}}}}}"
        config, _ = trial_of(load("demo", [mixers, "model.pattern=it", "model.dim=480"]))
        dim = config.model.dim
        assert dim >= 48
        assert dim % heads == 0
        assert dim // heads % 2 == 0
        assert not any(width % heads == 0 and width // heads % 2 == 0 for width in range(48, dim))

    @pytest.mark.parametrize("kind", sorted(MIXERS))
    def test_no_mixer_makes_the_trial_void(self, kind: str) -> None:
        """With its defaults it meets less than everything in the trial, unless it meets everything at any length."""
        mixer = {"kind": kind} | dataclasses.asdict(MIXERS[kind].Config())
        sparse_by_nature = share_met(mixer, 256, length=65536) < 0.45
        if sparse_by_nature:
            assert share_met(scaled(mixer, 256), 256) < 0.9
        else:
            assert scaled(mixer, 256) == mixer

    @pytest.mark.parametrize("name", loadable_configs())
    def test_every_shipped_configuration_has_a_trial(self, name: str) -> None:
        config, _ = trial_of(load(name))
        model = DecoderLM(config.model)
        assert model(torch.zeros(2, LENGTH, dtype=torch.int64)).shape == (2, LENGTH, 4)
        assert sum(p.numel() for p in model.parameters()) < 1e6


class TestCommand:
    """`lmtrain audit --floor`."""

    def config(self, folder: Path, kind: str) -> str:
        path = folder / "cheat.yaml"
        path.write_text(
            "data: {corpus: iid, tokenizer: characters, seq_len: 32}\ntrain: {batch_tokens: 64}\n"
            f"model: {{dim: 16, layers: 1, vocab_size: 4, mixers: {{it: {kind}}}, pattern: it}}\n"
        )
        return str(path)

    def test_a_strict_cheat_exits_with_4(self, cheat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = self.config(tmp_path, "{kind: next}")
        assert main(["audit", path, "--floor", "--steps", "40"]) == 4
        text = capsys.readouterr().out
        assert "LEAK: below the floor" in text
        assert "2 layers of 'it', width 16, trained for 40 steps" in text

    def test_json_holds_both_findings(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = self.config(tmp_path, "{kind: local, heads: 2, window: 64}")
        assert main(["audit", path, "--floor", "--steps", "4", "--json"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["leaks"], row["floor"]["leaks"], row["floor"]["steps"]) == (False, False, 4)
        assert row["floor"]["sequences"] >= 4096
        assert row["floor"]["changes"] == ["it.window 64 -> 8"]
        assert main(["audit", path, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["floor"] is None

    def test_steps_without_floor_are_a_mistake(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["audit", "demo", "--steps", "4"]) == 2
        assert "--floor" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mosa-paper", "mosa"])
def test_the_published_selection_falls_and_the_strict_one_does_not(name: str) -> None:
    config = load(f"leak/{name}", ["model.vocab_size=4", "train.steps=150"])
    report = trial(config, sequences=512)
    if name == "mosa":
        assert not report.below
        assert report.one_pass.mean < report.floor + 0.003
    else:
        assert report.one_pass.mean < report.floor - 0.01
        assert report.below
        assert report.prefix_wise is not None
        assert report.prefix_wise.mean > report.floor
