"""InAttention: keys and values of the initial states, and the one cache that all layers share."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention.inattention import InitialStates
from attention.mixer import Context, Mixer, build, read_settings

KEYS = {"positions": "rotary", "cache": "keys"}


def make(dim: int = 24, **settings: Any) -> Mixer:
    """In float64, always with the same weights."""
    torch.manual_seed(0)
    return build("inattention", dim, **{"heads": 4, "kv_heads": 2, **settings}).double().eval()


def some(length: int, dim: int = 24, batch: int = 2, seed: int = 1) -> Tensor:
    """Vectors [B, T, d]."""
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# Settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"positions": "rotary"}, ("cache", "cache initial cannot hold the rotated keys of positions rotary")),
        ({**KEYS, "rotary": 0}, ("rotary", "rotary must be a base > 1 with positions rotary, got 0")),
        ({**KEYS, "rotary": 0.5}, ("rotary", "rotary must be a base > 1, or 0 = off; got 0.5")),
        ({**KEYS, "head_dim": 5}, ("head_dim", "head_dim 5 must be even while rotary is on")),
        ({"kv_heads": 3}, ("kv_heads", "kv_heads 3 does not divide heads 8")),
        ({"positions": "sinus"}, ("positions", "positions must be alibi or rotary or none, got 'sinus'")),
        ({"cache": "values"}, ("cache", "cache must be initial or keys, got 'values'")),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], expected: tuple[str, str]) -> None:
    ((key, message),) = read_settings("inattention", 16, settings)[1]
    assert key == expected[0]
    assert message.startswith(expected[1])


@pytest.mark.parametrize("positions", ["alibi", "none"])
@pytest.mark.parametrize("cache", ["initial", "keys"])
def test_the_base_is_unused_where_nothing_rotates(positions: str, cache: str) -> None:
    settings = {"head_dim": 5, "positions": positions, "cache": cache}
    one, other = make(rotary=0.0, **settings), make(rotary=500.0, **settings)
    assert torch.equal(one(some(9)).y, other(some(9)).y)


def test_initial_states_have_the_shape_of_x() -> None:
    with pytest.raises(ValueError, match=r"ctx.initial must have shape \[2, 9, 24\] as x, got \[2, 8, 24\]"):
        make()(some(9), Context(initial=some(8)))


# What a query meets


@pytest.mark.parametrize(
    ("settings", "base"),
    [({"positions": "none"}, 0.0), ({**KEYS, "rotary": 100.0}, 100.0), ({"positions": "none", "cache": "keys"}, 0.0)],
)
def test_of_its_own_states_it_is_dense(settings: dict[str, Any], base: float) -> None:
    """Without a context, and as the first layer behind the same norm: with the very weights of `dense`."""
    mixer = make(**settings)
    dense = build("dense", 24, heads=4, kv_heads=2, rotary=base).double()
    dense.load_state_dict(mixer.state_dict())
    x = some(30)
    close(mixer(x).y, dense(x).y)
    close(mixer(x, Context(initial=x)).y, dense(x).y)


@pytest.mark.parametrize("settings", [{}, {"positions": "none"}, KEYS])
def test_states_of_other_layers_are_never_keys(settings: dict[str, Any]) -> None:
    """With x0 held, another x at all j != i leaves y_i bit-equal; another x0 at any j <= i does not."""
    mixer, x, x0 = make(**settings), some(30), some(30, seed=2)
    y = mixer(x, Context(initial=x0)).y
    for i in (0, 13, 29):
        others = 100 * some(30, seed=3)
        others[:, i] = x[:, i]
        assert torch.equal(mixer(others, Context(initial=x0)).y[:, i], y[:, i])
        for j in range(i + 1):
            changed = x0.clone()
            changed[:, j] += 1
            assert not torch.equal(mixer(x, Context(initial=changed)).y[:, i], y[:, i])


def test_alibi_halves_the_weight_of_a_key_every_so_many_tokens() -> None:
    """Without logits, the weight of a key is exp(-slope distance); 8 heads have the slopes 1/2, 1/4, .. 1/256."""
    mixer = make(dim=8, heads=8, kv_heads=8, head_dim=8)
    with torch.no_grad():
        mixer.qkv.weight.zero_()
        mixer.qkv.weight[-64:] = torch.eye(8).repeat(8, 1)  # v = x0 in every head
        mixer.output.weight.zero_()
    heads: list[Tensor] = []
    mixer.output.register_forward_hook(lambda module, inputs, output: heads.append(inputs[0]))
    mixer(some(5, dim=8), Context(initial=torch.eye(8, dtype=torch.float64)[None, :5].expand(2, -1, -1)))
    weights = heads[0].unflatten(2, (8, 8))[0, 4]  # of the last query: [head, key]
    slopes = (weights[:, 1:5] / weights[:, 0:4]).log()
    close(slopes, 2.0 ** -torch.arange(1, 9, dtype=torch.float64)[:, None].expand(8, 4))


def test_where_a_document_stands_in_a_stream_is_no_matter() -> None:
    """Ten million positions on, a float32 bias counted from the start of the document would be off by 0.5."""
    mixer, x = make(positions="alibi").float(), some(20).float()
    far = torch.arange(20).expand(2, -1) + 10**7
    assert torch.equal(mixer(x, Context(positions=far)).y, mixer(x).y)


# The cache


def decode(mixer: Mixer, x: Tensor, x0: Tensor, chunks: list[int], **ctx: Tensor) -> tuple[Tensor, Any]:
    """y of all tokens, given to a state in chunks, and the state."""
    state, parts, start = mixer.init_state(len(x)), [], 0
    with torch.no_grad():
        for chunk in chunks:
            here = slice(start, start + chunk)
            fields = {name: value[:, here] for name, value in ctx.items()}
            parts.append(mixer(x[:, here], Context(initial=x0[:, here], **fields), state).y)
            start += chunk
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("positions", ["alibi", "none"])
def test_the_cache_holds_initial_states_alone(positions: str) -> None:
    mixer = make(positions=positions)
    y, state = decode(mixer, some(50), some(50, seed=2), [30] + [1] * 20)
    close(y, mixer(some(50), Context(initial=some(50, seed=2))).y)
    assert state.bytes == 2 * 50 * 24 * 8 == 2 * mixer.cost(50).state_bytes
    keys = make(positions=positions, cache="keys")
    assert keys.cost(50).state_bytes == 50 * 2 * 2 * 6 * 8
    assert keys.cost(50).flops == mixer.cost(50).flops


@pytest.mark.parametrize("positions", ["alibi", "none"])
def test_decoding_by_absorption_costs_4hd_a_token_of_the_past(positions: str) -> None:
    """The queries meet x0 itself: no key and no value of an earlier token is made."""
    mixer, x = make(positions=positions), some(41, batch=1)
    _, state = decode(mixer, x[:, :40], x[:, :40], [40])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x[:, 40:], None, state)
    heads, dim, width = 4, 24, 6
    matrices = 4 * 2 * heads * dim * width  # W_q, W_k, W_v and W_o of the one query
    assert counter.get_total_flops() == matrices + 4 * heads * dim * 41


def test_a_long_prompt_makes_keys_and_values_instead() -> None:
    """4 H d for each of T^2 / 2 pairs would be d / D times the work of attention."""
    mixer, x = make(), some(200, batch=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x, None, mixer.init_state(1))
    assert counter.get_total_flops() == mixer.cost(200).flops


def test_biases_of_a_long_cache_are_not_rounded() -> None:
    """In float32, slope 1/2 at position 4,000 is off by up to 6e-5; counted from the new token it is exact."""
    settings, x = {"dim": 8, "heads": 8, "kv_heads": 8}, some(4000, dim=8, batch=1)
    mixer, rounded = make(**settings), make(**settings).float()
    last = mixer(x).y[:, -1]
    one_pass = (rounded(x.float()).y[:, -1] - last).abs().max()
    decoded = (decode(rounded, x.float(), x.float(), [3999, 1])[0][:, -1] - last).abs().max()
    assert decoded < 1e-6 < one_pass


def test_rows_that_own_different_numbers_of_living_states() -> None:
    """The first row is one document, the second begins one again and again: dead states are forgotten, padding kept."""
    mixer, length = make(), 300
    x, x0 = some(length), some(length, seed=2)
    positions = torch.stack([torch.arange(length), torch.arange(length) % 70])
    positions[0, 130:] -= 130
    y, state = decode(mixer, x, x0, [100] + [1] * 200, positions=positions)
    close(y, mixer(x, Context(initial=x0, positions=positions)).y)
    assert state.bytes == (170 + 20) * 24 * 8
    assert state.capacity < 2 * length * 24 * 8


def test_states_given_to_backward_are_left_alone_by_later_tokens() -> None:
    """Also where only the weights learn: the cache grows in place."""
    x, gradients = some(12), []
    for more in (False, True):
        mixer = make()
        state = mixer.init_state(2)
        mixer(x[:, :4], None, state)
        y = mixer(x[:, 4:9], None, state).y
        if more:
            mixer(x[:, 9:], None, state)
        y.square().sum().backward()
        gradients.append(mixer.qkv.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("positions", ["alibi", "none"])
def test_absorption_has_the_gradients_of_keys_and_values(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for absorb in (False, True):
        monkeypatch.setattr("attention.inattention.InAttention._absorbing_is_cheaper", lambda self, new, a=absorb: a)
        mixer, x = make(positions=positions), some(12)
        state = mixer.init_state(2)
        mixer(x[:, :7], None, state)
        leaf, initial = x[:, 7:].clone().requires_grad_(), some(5, seed=2).requires_grad_()
        y = mixer(leaf, Context(initial=initial), state).y
        y.square().sum().backward()
        found.append([y, leaf.grad, initial.grad, *(p.grad for p in mixer.parameters())])
    for one, other in zip(*found, strict=True):
        assert one.abs().sum() > 0
        close(one, other, atol=1e-11)


def test_decoding_under_autocast() -> None:
    mixer, x, x0 = make().float(), some(20).float(), some(20, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = decode(mixer, x, x0, [12] + [1] * 8)
    assert state.bytes == 2 * 20 * 24 * 2
    exact = mixer(x, Context(initial=x0)).y
    assert (y.float() - exact).norm() < 2**-6 * exact.norm()


# Shared by layers


def test_layers_that_share_store_once() -> None:
    """Three layers over one cache: each decodes as if alone, together they hold one tensor and no graph."""
    layers = [make(positions=p) for p in ("alibi", "none", "alibi")]
    assert {layer.shared_state for layer in layers} == {"initial states"}
    x0, inputs = some(50), [some(50, seed=s) for s in (2, 3, 4)]
    first: InitialStates = layers[0].init_state(2)
    states = [first, first.of_another_layer(), first.of_another_layer()]
    outputs: list[list[Tensor]] = [[], [], []]
    for here in (slice(0, 5), slice(5, 25), *(slice(t, t + 1) for t in range(25, 50))):
        for x, layer, state, y in zip(inputs, layers, states, outputs, strict=True):
            y.append(layer(x[:, here], Context(initial=x0[:, here]), state).y)
            assert state.bytes == 2 * here.stop * 24 * 8
    for x, layer, y in zip(inputs, layers, outputs, strict=True):
        close(torch.cat(y, 1), layer(x, Context(initial=x0)).y)
    assert first.capacity < 2 * first.bytes
    assert not vars(first._rows)["_given"]


def test_shared_states_are_forgotten_only_when_all_layers_have_read_them() -> None:
    """With a limit, a long chunk leaves most of its own tokens dead: the second layer still meets them."""
    layers, x0 = [make(), make(positions="none")], some(200)
    expected = []
    for layer in layers:
        state = layer.init_state(2, limit=16)
        with torch.no_grad():
            expected.append(torch.cat([layer(x, None, state).y for x in x0.split(100, 1)], 1))
    first = layers[0].init_state(2, limit=16)
    states, outputs = [first, first.of_another_layer()], [[], []]
    with torch.no_grad():
        for x in x0.split(100, 1):
            for layer, state, y in zip(layers, states, outputs, strict=True):
                y.append(layer(x, None, state).y)
    assert all(torch.equal(torch.cat(y, 1), e) for y, e in zip(outputs, expected, strict=True))
    assert first.bytes == 2 * 15 * 24 * 8


def test_layers_that_are_out_of_step_are_told() -> None:
    layer = make()
    first = layer.init_state(2)
    other = first.of_another_layer()
    layer(some(5), None, first)
    with pytest.raises(AssertionError, match="must read the same tokens"):
        layer(some(3), None, other)
    with pytest.raises(AssertionError, match="before the first token"):
        first.of_another_layer()


@pytest.mark.parametrize("cache", ["initial", "keys"])
def test_only_initial_states_are_shared(cache: str) -> None:
    assert (make(cache=cache).shared_state is not None) == (cache == "initial")
