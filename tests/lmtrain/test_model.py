"""The decoder: first weights, the loss, decoding, what it costs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention.cache import LivingKeys
from attention.mixer import MIXERS, Causality, Context, Cost, Mixer, MixerOutput, register
from lmtrain.config import ModelConfig
from lmtrain.model import DecoderLM, pattern_of

MIXED = {"near": {"kind": "local", "heads": 2, "window": 4}, "far": {"kind": "dense", "heads": 4, "kv_heads": 2}}


def config(**settings: Any) -> ModelConfig:
    """A small model of two layers, of which the first is a window."""
    given = {"dim": 16, "layers": 2, "vocab_size": 13, "mixers": MIXED, "pattern": "near far", **settings}
    return ModelConfig(**given)


def make(**settings: Any) -> DecoderLM:
    """The same weights every time."""
    torch.manual_seed(0)
    return DecoderLM(config(**settings)).double().eval()


def some_tokens(batch: int = 2, length: int = 15) -> Tensor:
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# Patterns and first weights


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("near", 3, [["near"]] * 3),
        ("near near far", 4, [["near"], ["near"], ["far"], ["near"]]),
        ("near+far far", 2, [["near", "far"], ["far"]]),
    ],
)
def test_a_pattern_is_repeated_over_the_layers(pattern: str, layers: int, expected: list[list[str]]) -> None:
    made = config(pattern=pattern, layers=layers)
    assert pattern_of(made) == expected
    assert [[name for name, _ in block.items()] for block in DecoderLM(made).layers] == expected


@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
def test_first_weights_are_as_stated(ffn: str) -> None:
    """N(0, 1 / fan_in), what writes to the residual stream times (2 layers)^-1/2, norms 1."""
    torch.manual_seed(0)
    model = DecoderLM(config(dim=128, layers=3, ffn=ffn, vocab_size=512, learned_positions=256))
    for name, parameter in model.state_dict().items():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        expected = parameter.shape[1] ** -0.5
        if name.endswith(("output.weight", "down.weight")):
            expected *= 6**-0.5
        assert parameter.std() == pytest.approx(expected, rel=0.05), name
        assert parameter.mean().abs() < expected / 20, name


def test_a_given_spread_of_first_weights() -> None:
    torch.manual_seed(0)
    model = DecoderLM(config(dim=128, layers=3, init_std=0.02))
    weights = model.state_dict()
    assert weights["head.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert weights["blocks.0.ffn.down.weight"].std() == pytest.approx(0.02 * 6**-0.5, rel=0.05)


def test_a_model_needs_a_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"model.vocab_size is not known yet"):
        DecoderLM(config(vocab_size=None))


# Forward, loss


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, tokens = make(), some_tokens(2, 16)
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    logits = model(tokens[:, :-1])
    assert logits.shape == (2, 15, 13)
    total, count, losses = model.loss(tokens[:, :-1], labels)
    close(total, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    assert (int(count), losses) == (25, {})


def test_the_residual_stream_is_a_sum_of_branches() -> None:
    model, tokens = make(pattern="near+far", layers=1), some_tokens()
    (block,) = model.layers
    x = model.embedding(tokens)
    normed = block.mixer_norm(x)
    x = x + sum(mixer(normed).y for _, mixer in block.items())
    x = x + block.ffn(block.ffn_norm(x))
    close(model(tokens), model.norm(x) @ model.head.weight.T)


def test_mixers_are_told_the_initial_states_and_the_stream() -> None:
    model, tokens, heard = make(), some_tokens(), []
    for block in model.layers:
        for _, mixer in block.items():
            mixer.register_forward_hook(lambda module, inputs, output: heard.append(inputs[1]))
    model(tokens)
    embedded = model.embedding(tokens)
    for ctx in heard:
        close(ctx.initial, F.rms_norm(embedded, (16,)))
    close(heard[0].residual, embedded)
    assert not torch.equal(heard[1].residual, embedded)


def test_a_tied_head_is_the_embedding() -> None:
    model = make(tied=True)
    hidden, _ = model.hidden(some_tokens())
    close(model(some_tokens()), hidden @ model.embedding.weight.T)
    assert sum(p.shape == (13, 16) for p in model.parameters()) == 1


def test_dropout_only_while_training() -> None:
    model, tokens = make(dropout=0.5), some_tokens()
    assert torch.equal(model(tokens), model(tokens))
    close(model(tokens), make()(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("settings", [{"norm": "layernorm"}, {"ffn": "gelu"}, {"ffn_dim": 24}, {"tied": True}])
def test_every_weight_learns(settings: dict[str, Any]) -> None:
    model = make(**settings)
    total, _, _ = model.loss(some_tokens(), some_tokens())
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert not any("bias" in name for name, _ in model.named_parameters())


# Decoding and documents


@pytest.mark.parametrize("settings", [{}, {"learned_positions": 15}])
@pytest.mark.parametrize("chunks", [[1] * 15, [4, 1, 10], [15]])
def test_decoding_equals_one_pass(settings: dict[str, Any], chunks: list[int]) -> None:
    model, tokens = make(**settings), some_tokens()
    state = model.init_state(2)
    with torch.no_grad():
        close(torch.cat([model(part, None, state) for part in tokens.split(chunks, 1)], 1), model(tokens))
    assert state.bytes == 2 * model.cost(15).state_bytes
    assert state.bytes <= state.capacity


def test_a_limit_reaches_every_layer() -> None:
    model = make()
    state = model.init_state(1, limit=6)
    with torch.no_grad():
        model(some_tokens(1, 30), None, state)
    near, far = (next(iter(layer.values())).bytes for layer in state.layers)
    assert (near, far) == (3 * 2 * 2 * 8 * 8, 5 * 2 * 2 * 4 * 8)


@pytest.mark.parametrize("learned", [None, 15])
def test_a_packed_document_equals_the_document_alone(learned: int | None) -> None:
    model, tokens = make(learned_positions=learned), some_tokens()
    positions = torch.cat([torch.arange(6), torch.arange(9)]).expand(2, -1)
    packed = model(tokens, Context(positions=positions))
    close(packed[:, :6], model(tokens[:, :6]))
    close(packed[:, 6:], model(tokens[:, 6:]))

    state = model.init_state(2)
    model(tokens[:, :4], Context(positions=positions[:, :4]), state)
    close(model(tokens[:, 4:], Context(positions=positions[:, 4:]), state), packed[:, 4:])


def test_a_position_outside_the_table_is_named() -> None:
    model = make(learned_positions=10)
    model(some_tokens(1, 10))
    with pytest.raises(ValueError, match=r"position 10 lies outside .* model.learned_positions = 10"):
        model(some_tokens(1, 11))
    state = model.init_state(1)
    model(some_tokens(1, 10), None, state)
    with pytest.raises(ValueError, match="position 10 lies outside"):
        model(some_tokens(1, 1), None, state)


# States that layers share


SHARING = {
    "in": {"kind": "inattention", "heads": 2},
    "even": {"kind": "inattention", "heads": 4, "kv_heads": 2, "positions": "none"},
    "own": {"kind": "inattention", "heads": 2, "cache": "keys"},
    "near": MIXED["near"],
}


def sharing(pattern: str, layers: int) -> DecoderLM:
    """A model in which mixers of `inattention` may share one tensor of initial states."""
    return make(mixers=SHARING, pattern=pattern, layers=layers)


@pytest.mark.parametrize("chunks", [[1] * 15, [4, 1, 10], [15]])
@pytest.mark.parametrize(("pattern", "layers"), [("in", 3), ("near in", 4), ("in+even near even", 3)])
def test_a_shared_state_is_made_grown_and_counted_once(
    pattern: str, layers: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, appended = sharing(pattern, layers), some_tokens(), []
    extend = LivingKeys.extend

    def watched(self: LivingKeys, k: Tensor, *others: Any) -> Any:
        appended.append(k.shape)
        return extend(self, k, *others)

    monkeypatch.setattr(LivingKeys, "extend", watched)
    state = model.init_state(2)
    with torch.no_grad():
        close(torch.cat([model(part, None, state) for part in tokens.split(chunks, 1)], 1), model(tokens))
    assert [new for _, _, new, width in appended if width == 16] == chunks

    windows = pattern_of(model.config).count(["near"])
    one_sequence = 15 * 16 * 8 + windows * 3 * 2 * 2 * 8 * 8
    assert state.bytes == 2 * one_sequence
    assert model.cost(15).state_bytes == one_sequence
    doubled = 2 * 15 * (16 + windows * 2 * 2 * 8) * 8
    assert state.bytes <= state.capacity <= 2 * doubled


def test_a_shared_state_is_charged_to_the_first_that_uses_it() -> None:
    model = sharing("near in+even own in", 4)
    costs = model.layer_costs(15)
    assert [{name: cost.state_bytes for name, cost in of_layer.items()} for of_layer in costs] == [
        {"near": 3 * 2 * 2 * 8 * 8, "ffn": 0},
        {"in": 15 * 16 * 8, "even": 0, "ffn": 0},
        {"own": 15 * 2 * 2 * 8 * 8, "ffn": 0},
        {"in": 0, "ffn": 0},
    ]
    alone = [mixer.cost(15).state_bytes for _, mixer in model.layers[1].items()]
    assert alone == [15 * 16 * 8] * 2


def test_a_limit_and_documents_hold_in_a_shared_state() -> None:
    model, tokens = sharing("in even", 2), some_tokens(2, 90)
    state = model.init_state(2, limit=7)
    with torch.no_grad():
        model(tokens, None, state)
    assert state.bytes == 2 * 6 * 16 * 8

    positions = torch.stack([torch.arange(90), torch.arange(90) % 40])
    state = model.init_state(2)
    with torch.no_grad():
        fields = zip(tokens.split([70, 1, 19], 1), positions.split([70, 1, 19], 1), strict=True)
        y = torch.cat([model(part, Context(positions=p), state) for part, p in fields], 1)
        close(y[:1], model(tokens[:1]))
        for start, stop in ((0, 40), (40, 80), (80, 90)):
            close(y[1:, start:stop], model(tokens[1:, start:stop]))
    assert state.bytes == (90 + 10) * 16 * 8


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_the_initial_states_is_the_sum_over_layers(checkpointing: bool) -> None:
    """Numerically, and by the embedding: what reaches it through the initial states is not lost."""
    model, tokens = sharing("in near even", 3), some_tokens(1, 4)
    model.activation_checkpointing = checkpointing
    initial = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(initial: Tensor) -> Tensor:
        return model.loss(tokens, tokens, Context(initial=initial))[0]

    assert torch.autograd.gradcheck(loss, initial.requires_grad_())


def test_activation_checkpointing_keeps_the_gradient_of_the_initial_states() -> None:
    def gradient(*, checkpointing: bool, detached: bool = False) -> Tensor:
        model = sharing("in even", 3)
        model.activation_checkpointing = checkpointing
        embedded = F.rms_norm(model.embedding(some_tokens()), (16,))
        ctx = Context(initial=embedded.detach()) if detached else None
        model.loss(some_tokens(), some_tokens(), ctx)[0].backward()
        return model.embedding.weight.grad

    plain = gradient(checkpointing=False)
    assert torch.equal(gradient(checkpointing=True), plain)
    assert (gradient(checkpointing=False, detached=True) - plain).norm() > 0.01 * plain.norm()


# What mixers may add


@dataclass
class ChattyConfig:
    """How much it says."""

    loss: float = 1.0
    ahead: bool = False

    def problems(self, dim: int) -> list[tuple[str, str]]:
        return []


class Chatty(Mixer):
    """Passes everything on, with an auxiliary loss, and counts its steps."""

    Config = ChattyConfig

    def __init__(self, dim: int, config: ChattyConfig) -> None:
        super().__init__()
        self.config = config
        self.causality: Causality = "selects_ahead" if config.ahead else "strict"
        self.scale = nn.Parameter(torch.ones(dim))
        self.steps: list[bool] = []

    def forward(self, x: Tensor, ctx: Context | None = None, state: Any = None) -> MixerOutput:
        return MixerOutput(x * self.scale, {"balance": self.config.loss * self.scale.mean()})

    def init_state(self, batch: int, limit: int | None = None) -> None:
        return None

    def cost(self, length: int) -> Cost:
        return Cost(16, 0, 0, 0)

    def after_step(self, skipped: bool = False) -> None:
        self.steps.append(skipped)


@pytest.fixture
def chatty() -> Iterator[dict[str, dict[str, Any]]]:
    """Mixers that have something to say."""
    register("chatty")(Chatty)
    yield {"one": {"kind": "chatty"}, "two": {"kind": "chatty", "loss": 0.5, "ahead": True}}
    del MIXERS["chatty"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_auxiliary_losses_add_up_by_name(chatty: dict[str, Any], checkpointing: bool) -> None:
    model = make(mixers=chatty, pattern="one+two one")
    model.activation_checkpointing = checkpointing
    total, _, losses = model.loss(some_tokens(), some_tokens())
    assert {name: float(loss.detach()) for name, loss in losses.items()} == {"balance": 2.5}
    (total * 0 + losses["balance"]).backward()
    close(model.layers[0].mixers["two"].scale.grad, torch.full((16,), 0.5 / 16, dtype=torch.float64))


def test_every_mixer_hears_of_the_step(chatty: dict[str, Any]) -> None:
    model = make(mixers=chatty, pattern="one+two one")
    model.after_step()
    model.after_step(skipped=True)
    assert [mixer.steps for block in model.layers for _, mixer in block.items()] == [[False, True]] * 3


def test_one_mixer_that_sees_ahead_is_enough(chatty: dict[str, Any]) -> None:
    assert make(mixers=chatty, pattern="one").causality == "strict"
    assert make(mixers=chatty, pattern="one two").causality == "selects_ahead"


# Cost


@pytest.mark.parametrize("settings", [{}, {"ffn": "gelu"}, {"pattern": "near+far"}, {"tied": True}])
def test_cost_is_what_torch_counts(settings: dict[str, Any]) -> None:
    model = make(**settings)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(some_tokens(1, 15))
    cost = model.cost(15)
    assert cost.flops == counter.get_total_flops()
    assert cost.parameters == sum(p.numel() for p in model.parameters())


def test_cost_by_layer() -> None:
    costs = make().layer_costs(15)
    assert [list(of_layer) for of_layer in costs] == [["near", "ffn"], ["far", "ffn"]]
    assert costs[0]["near"].pairs == 2 * (4 * 15 - 6)
    assert costs[1]["far"].pairs == 4 * 15 * 16 / 2
    assert costs[0]["ffn"] == Cost(3 * 16 * 64, 2 * 15 * 3 * 16 * 64, 0, 0)
