"""The registry, and settings that are wrong in every way at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from attention.mixer import (
    MIXERS,
    Context,
    Cost,
    Mixer,
    MixerOutput,
    build,
    floating,
    init_fan_in,
    no_weight_decay,
    parameter_count,
    read_settings,
    register,
    residual_output,
    setting,
    type_in_words,
)


@dataclass
class ToyConfig:
    """A setting of every type."""

    kind_of: Literal["fixed", "strided"] = "fixed"
    width: int = setting(4, "how wide", at_least=1)
    decay: float = setting(0.9, "how much stays", at_least=0, below=1)
    span: int | None = setting(None, "how far", at_least=2)
    strict: bool = True

    def problems(self, dim: int) -> list[tuple[str, str]]:
        return [("width", f"width {self.width} does not divide dim {dim}")] if dim % self.width else []


class Toy(Mixer):
    """Passes everything on."""

    Config = ToyConfig

    def __init__(self, dim: int, config: ToyConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, ctx: Context | None = None, state: Any = None) -> MixerOutput:
        return MixerOutput(x, {})

    def init_state(self, batch: int, limit: int | None = None) -> None:
        return None

    def cost(self, length: int) -> Cost:
        return Cost(0, 0, 0, 0)


@pytest.fixture
def toy() -> Iterator[str]:
    """A registered mixer."""
    register("toy")(Toy)
    yield "toy"
    del MIXERS["toy"]


def problems(name: str, dim: int = 8, **settings: Any) -> list[tuple[str, str]]:
    """What is wrong with these settings."""
    return read_settings(name, dim, settings)[1]


def test_a_file_of_the_folder_is_registered() -> None:
    assert {"dense", "local"} <= MIXERS.keys()


def test_build_fills_in_defaults(toy: str) -> None:
    mixer = build(toy, 8, width=2, decay=0)
    assert mixer.config == ToyConfig(width=2, decay=0)
    assert mixer.causality == "strict"
    assert mixer.after_step() is None


def test_a_name_is_taken_once(toy: str) -> None:
    with pytest.raises(AssertionError, match="two mixers are called toy"):
        register(toy)(Toy)


def test_an_unknown_mixer_is_named_with_the_nearest(toy: str) -> None:
    ((key, message),) = problems("tpy")
    assert key == "kind"
    assert message.startswith("no such mixer: tpy; did you mean toy? (")
    assert "dense, " in message


def test_an_unknown_setting_is_named_with_the_nearest(toy: str) -> None:
    assert problems(toy, widht=3) == [
        ("widht", "no such setting of toy; did you mean width? (kind_of, width, decay, span, strict)")
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": True}, "width must be a whole number, got True"),
        ({"width": 2.0}, "width must be a whole number, got 2.0"),
        ({"width": "2"}, "width must be a whole number, got '2'"),
        ({"width": None}, "width must be a whole number, got None"),
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"span": 1}, "span must be >= 2, got 1"),
        ({"span": 2.5}, "span must be a whole number or null, got 2.5"),
        ({"decay": 1}, "decay must be < 1, got 1"),
        ({"decay": -0.1}, "decay must be >= 0, got -0.1"),
        ({"decay": float("nan")}, "decay must be a number, got nan"),
        ({"decay": False}, "decay must be a number, got False"),
        ({"strict": 1}, "strict must be true or false, got 1"),
        ({"kind_of": "axial"}, "kind_of must be fixed or strided, got 'axial'"),
        ({"width": 3}, "width 3 does not divide dim 8"),
    ],
)
def test_a_wrong_value_is_told(toy: str, settings: dict[str, Any], message: str) -> None:
    assert problems(toy, **settings) == [(next(iter(settings)), message)]


def test_right_values_are_taken(toy: str) -> None:
    assert problems(toy, kind_of="strided", width=2, decay=0, span=None, strict=False) == []


def test_all_problems_are_told_at_once(toy: str) -> None:
    assert len(problems(toy, width=0, decay=2, colour="red")) == 3
    with pytest.raises(ValueError, match=r"width must be >= 1.*; decay must be < 1"):
        build(toy, 8, width=0, decay=2)


@pytest.mark.parametrize(
    ("dim", "settings", "expected"),
    [
        (16, {"heads": 8, "kv_heads": 3}, ("kv_heads", "kv_heads 3 does not divide heads 8; nearest: 2, 4")),
        (16, {"heads": 2, "kv_heads": 4}, ("kv_heads", "kv_heads 4 does not divide heads 2; nearest: 2")),
        (10, {"heads": 4}, ("heads", "heads 4 does not divide dim 10; nearest: 2, 5 (or set head_dim)")),
        (6, {"heads": 2}, ("head_dim", "head_dim 3 must be even while rotary is on")),
        (8, {"heads": 2, "head_dim": 5}, ("head_dim", "head_dim 5 must be even while rotary is on")),
        (8, {"heads": 2, "rotary": 0.5}, ("rotary", "rotary must be a base > 1, or 0 = off; got 0.5")),
    ],
)
def test_rules_between_the_settings_of_attention(dim: int, settings: dict[str, Any], expected: tuple[str, str]) -> None:
    assert problems("dense", dim, **settings) == [expected]


def test_odd_heads_without_rotary_are_allowed() -> None:
    assert problems("dense", 6, heads=2, rotary=0) == []
    assert problems("dense", 7, heads=2, kv_heads=1, head_dim=4) == []


@pytest.mark.parametrize(
    ("hint", "words"),
    [(int, "a whole number"), (float | None, "a number or null"), (Literal["a", "b"], "a or b"), (str, "text")],
)
def test_types_in_words(hint: Any, words: str) -> None:
    assert type_in_words(hint) == words


def test_costs_add() -> None:
    assert Cost(1, 2.0, 3.0, 4.0) + Cost(10, 20.0, 30.0, 40.0) == Cost(11, 22.0, 33.0, 44.0)


def test_tags_stay_with_their_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert residual_output(parameter) is no_weight_decay(parameter) is parameter
    assert parameter.residual_output is True
    assert parameter.no_weight_decay is True


def test_matrices_start_at_unit_gain() -> None:
    torch.manual_seed(0)
    weight = init_fan_in(nn.Linear(400, 300, bias=False)).weight.detach()
    assert weight.std() == pytest.approx(400**-0.5, rel=0.02)


def test_the_output_matrix_is_tagged() -> None:
    mixer = build("dense", 8, heads=2)
    tagged = [name for name, p in mixer.named_parameters() if getattr(p, "residual_output", False)]
    assert tagged == ["output.weight"]


def test_parameters_are_counted_without_weights() -> None:
    with torch.device("meta"):
        assert parameter_count(nn.Linear(10**6, 10**6, bias=False)) == 10**12


def test_floating_is_at_least_float32() -> None:
    wide = [floating(torch.zeros(1, dtype=t)) for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    assert wide == [torch.float32, torch.float32, torch.float32, torch.float64]
