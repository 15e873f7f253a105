"""In debug mode the first number that is not finite raises where it arises; otherwise it flows on."""

from typing import Any

import pytest
import torch

from attention.debug import check_finite
from attention.mixer import Context, build
from lmtrain.config import ModelConfig
from lmtrain.model import DecoderLM

NAN, INF = float("nan"), float("inf")
ROUTERS = {"mosa": "router.weight", "moh": "router.weight", "routing": "shared.weight", "sparsek": "router.weight"}


def test_what_is_said() -> None:
    x = torch.zeros(2, 3, 4)
    x[1, 2, 0], x[1, 0, 3], x[0, 2, 1] = NAN, INF, -INF
    with pytest.raises(FloatingPointError) as raised:
        check_finite(Context(debug=True, place=(3, "far")), "router scores", x)
    assert str(raised.value) == (
        "layer 3: far: router scores are not finite: 1 NaN and 2 infinite of 24, the first at [0, 2, 1] of [2, 3, 4]"
    )
    with pytest.raises(FloatingPointError) as raised:
        check_finite(Context(debug=True), "summed losses", x.sum())
    assert str(raised.value) == "summed losses are not finite: 1 NaN and 0 infinite of 1"


def test_otherwise_nothing_is_looked_at() -> None:
    nowhere = torch.full((3,), NAN, device="meta")  # asked for its value it would raise
    check_finite(None, "scores", nowhere)
    check_finite(Context(), "scores", nowhere)
    check_finite(Context(debug=True), "scores", torch.full((3,), 3e38))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("selection", ["strict", "paper"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_scores_of_every_mixer_that_chooses(kind: str, selection: str, value: float) -> None:
    """Under `debug` they raise before anything is chosen by them; an infinite one may never be noticed without."""
    settings: dict[str, Any] = {} if kind in ("moh", "sparsek") else {"selection": selection}
    if kind == "sparsek":
        settings["window"] = 4  # who is met by the window alone is not asked for a score
    mixer = build(kind, 16, **settings)
    dict(mixer.named_parameters())[ROUTERS[kind]].data[0, 0] = value
    x = torch.randn(2, 20, 16)
    y = mixer(x, Context()).y
    assert y.isnan().any() or value == INF
    with pytest.raises(FloatingPointError, match=r"(router|scores).* are not finite: "):
        mixer(x, Context(debug=True))


MODEL = {"dim": 16, "layers": 2, "vocab_size": 11, "tied": False, "pattern": "near+far",
         "mixers": {"near": {"kind": "local", "heads": 2}, "far": {"kind": "mosa", "heads": 2}}}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ("embedding.weight", "embeddings are"),
        ("blocks.1.mixers.far.router.weight", "layer 1: far: router scores are"),
        ("blocks.0.mixers.far.output", "layer 0: far: outputs of the mixer are"),
        ("blocks.1.mixers.near.qkv.weight", "layer 1: near: outputs of the mixer are"),
        ("blocks.0.ffn.up.weight", "layer 0: outputs of the feed-forward layer are"),
        ("head.weight", "summed losses are"),
    ],
)
def test_a_poisoned_weight_is_found_at_its_place(parameter: str, words: str, recompute: bool) -> None:
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(**MODEL))
    model.activation_checkpointing = recompute
    tokens = torch.arange(22).view(2, 11) % 11
    model.loss(tokens, tokens, Context(debug=True))
    with torch.no_grad():
        model.get_parameter(parameter).fill_(NAN)
    total, _, _ = model.loss(tokens, tokens, Context())
    assert total.isnan()
    with pytest.raises(FloatingPointError, match=f"^{words}"):
        model.loss(tokens, tokens, Context(debug=True))
