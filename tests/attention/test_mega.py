"""`mega`: the limits of the paper, what its implementations got wrong, 16 bits, states, settings, statistics."""

import math

import pytest
import torch

from attention.mixer import Context, build
from lmtrain.optimizer import hidden_matrices

DIM = 8


def ready(dtype=torch.float64, dim=DIM, seed=0, **settings):
    """A mixer whose weights are all of order one."""
    torch.manual_seed(seed)
    mixer = build("mega", dim, **settings).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def tokens(length, batch=2, dim=DIM, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, length, dim, dtype=dtype)


# Limits


@pytest.mark.parametrize("chunk", [20, 21, 1000])
def test_a_chunk_of_everything_is_no_chunk(chunk):
    x = tokens(20)
    whole, chunked = ready(chunk=None), ready(chunk=chunk)
    torch.testing.assert_close(chunked(x).y, whole(x).y, rtol=0, atol=1e-12)
    assert not torch.allclose(ready(chunk=19)(x).y, whole(x).y)


def test_without_the_average_nothing_passes_between_chunks():
    x = tokens(24)
    changed = torch.cat([x[:, :8] + 1, x[:, 8:]], 1)
    mixer = ready(chunk=8)
    assert not torch.equal(mixer(changed).y[:, 8:], mixer(x).y[:, 8:])
    with torch.no_grad():
        mixer.ema.beta.zero_()
    y, after = mixer(x).y, mixer(changed).y
    assert torch.equal(after[:, 8:], y[:, 8:])
    assert not torch.equal(after[:, :8], y[:, :8])


def test_one_number_per_channel_is_the_classic_recurrence():
    """With n = 1 and alpha, delta written out: h = (1 - a d) h + a beta x."""
    mixer, x = ready(ema_dim=1).ema, tokens(30)
    averaged, last = mixer(x, None, None)
    for channel in range(DIM):
        a, d = (1 / (1 + math.exp(-p[channel, 0].item())) for p in (mixer.alpha, mixer.delta))
        h = 0.0
        for t in range(30):
            now = x[0, t, channel].item()
            h = (1 - a * d) * h + a * mixer.beta[channel, 0].item() * now
            e = mixer.gamma[channel, 0].item() * h + mixer.omega[channel].item() * now
            assert averaged[0, t, channel].item() == pytest.approx(e / (1 + math.exp(-e)), abs=1e-12)
        assert last[0, channel, 0].item() == pytest.approx(h, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_of_zero_forgets_at_once(dtype):
    """Saturated in both gates: no NaN in values and gradients, and x' tells of its own token alone."""
    mixer, x = ready(dtype).ema, tokens(30, dtype=dtype)
    with torch.no_grad():
        mixer.alpha.fill_(50.0)
        mixer.delta.fill_(50.0)
    averaged = mixer(x, None, None)[0]
    alone = mixer(x.reshape(-1, 1, DIM), None, None)[0].view_as(x)
    torch.testing.assert_close(averaged, alone, rtol=0, atol=30 * torch.finfo(dtype).eps)
    averaged.sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_slow_decays_are_not_rounded():
    """1 - q = 2.5e-6: 1 - a d in float32 would be off by a hundredth of that."""
    mixer = ready(torch.float32).ema
    with torch.no_grad():
        mixer.alpha.fill_(math.log(1e-5))
        mixer.delta.fill_(math.log(1 / 3))
    log_decay = mixer.log_decay().detach().double()
    exact = math.log1p(-(1e-5 / (1 + 1e-5)) / 4)
    assert float((log_decay / exact - 1).abs().max()) < 1e-6


def test_the_bias_tells_the_distance_alone():
    """Tokens 5 to 16 of a document attend among themselves as tokens 0 to 11 do."""
    mixer, x = ready(chunk=None), tokens(12)
    with torch.no_grad():
        mixer.ema.beta.zero_()
    positions = torch.arange(5, 17).expand(2, -1)
    far = mixer(x, Context(positions=positions, residual=x)).y
    torch.testing.assert_close(far, mixer(x).y, rtol=0, atol=1e-12)


# The residual stream


def test_the_gate_mixes_with_the_residual_stream():
    """X + y = phi candidate + (1 - phi) X: with phi = 0 nothing changes, with phi = 1 nothing stays."""
    x, residual = tokens(10), tokens(10) * 3 + 1
    mixer = ready()
    with torch.no_grad():
        mixer.base.bias[:DIM] = -1e4
    assert torch.equal(mixer(x, Context(residual=residual)).y, torch.zeros_like(x))
    with torch.no_grad():
        mixer.base.bias[:DIM] = 1e4
    one, other = (r + mixer(x, Context(residual=r)).y for r in (residual, -residual))
    torch.testing.assert_close(one, other)


def test_without_a_residual_stream_the_input_stands_for_it():
    mixer, x = ready(), tokens(10)
    assert torch.equal(mixer(x).y, mixer(x, Context(residual=x)).y)
    assert not torch.equal(mixer(x).y, mixer(x, Context(residual=x + 1)).y)


# What implementations of the paper got wrong


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 17, 30])
def test_a_prefill_of_any_length_goes_on(length):
    """Above the chunk and no multiple of it, the reference raises."""
    mixer, x = ready(chunk=8).eval(), tokens(40)
    state = mixer.init_state(2)
    with torch.no_grad():
        parts = [mixer(part, None, state).y for part in (x[:, :length], x[:, length:])]
        torch.testing.assert_close(torch.cat(parts, 1), mixer(x).y, rtol=0, atol=1e-12)


def test_nothing_stale_is_left_in_evaluation():
    """Weights loaded after a first pass count in the second."""
    x = tokens(20)
    one, other = ready().eval(), ready(seed=5).eval()
    with torch.no_grad():
        one(x)
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(x).y, other(x).y)


# Types


def test_what_averages_stays_float32():
    mixer = ready(torch.float32).bfloat16()
    assert {p.dtype for p in mixer.ema.parameters()} == {torch.float32}
    assert {p.dtype for name, p in mixer.named_parameters() if not name.startswith("ema.")} == {torch.bfloat16}
    x = tokens(20, dtype=torch.bfloat16)
    state = mixer.init_state(2)
    y = mixer(x, Context(residual=x), state).y
    assert (y.dtype, state.h.dtype, state.rows["k"].dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in mixer.parameters())


def test_the_average_is_not_rounded_under_autocast():
    mixer, x = ready(torch.float32).ema, tokens(50, dtype=torch.float32)
    plain = mixer(x, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mixer(x, None, None)
    assert all(map(torch.equal, plain, cast))


def test_who_decays_and_who_is_orthogonalised():
    """No weight decay for the average and the gains; Muon has the matrices of the linear layers alone."""
    mixer = build("mega", DIM)
    linear = {"base.weight", "value.weight", "output.weight"}
    for name, p in mixer.named_parameters():
        assert getattr(p, "no_weight_decay", False) == (not name.startswith(("base", "value", "output"))), name
    names = {p: name for name, p in mixer.named_parameters()}
    assert {names[p] for p in hidden_matrices(torch.nn.Sequential(mixer))} == linear


def test_weights_start_as_published():
    torch.manual_seed(0)
    mixer = build("mega", 256)
    stds = {name: float(p.detach().std()) for name, p in mixer.named_parameters() if p.dim() == 2}
    expected = {"ema.alpha": 0.2, "ema.delta": 0.2, "ema.gamma": 1.0} | dict.fromkeys(
        ("base.weight", "value.weight", "output.weight"), 0.02
    )
    for name, std in expected.items():
        assert stds[name] == pytest.approx(std, rel=0.05), name
    assert float((mixer.ema.beta.detach() - torch.tensor([1.0, -1.0] * 8)).std()) == pytest.approx(0.02, rel=0.05)
    for vector in (mixer.query_gain, mixer.key_gain, mixer.query_bias, mixer.key_bias):
        assert float(vector.detach().std()) == pytest.approx(0.02, rel=0.4)
    zero = (mixer.query_shift, mixer.key_shift, mixer.base.bias, mixer.value.bias, mixer.output.bias)
    assert not any(v.any() for v in zero)
    assert float(mixer.ema.omega.detach().std()) == pytest.approx(1.0, rel=0.2)


# States


def test_decoding_holds_as_much_after_many_chunks_as_after_one():
    mixer, x = ready(chunk=16).eval(), tokens(1, batch=1)
    state = mixer.init_state(1)
    held, capacity = {}, {}
    with torch.no_grad():
        for t in range(1, 20 * 16 + 1):
            mixer(x, None, state)
            held[t], capacity[t] = state.bytes, state.capacity
    of_average, row = DIM * 16 * 8, (2 + 2 * DIM) * 8
    assert all(held[t] == of_average + t % 16 * row for t in held)
    assert max(capacity[t] for t in range(10 * 16, 20 * 16)) <= max(capacity[t] for t in range(1, 10 * 16))


def test_states_of_others_are_refused():
    mixer, x = ready(), tokens(3)
    with pytest.raises(ValueError, match=r"state was made for 1 sequences, got 2"):
        mixer(x, None, mixer.init_state(1))
    for other in (ready(ema_dim=2), ready(query_dim=4), ready(value_dim=3)):
        with pytest.raises(ValueError, match=r"\(dim, ema_dim, query_dim, value_dim\) = \(8, .*, not \(8, 16, 2, 16\)"):
            mixer(x, None, other.init_state(2))
    with pytest.raises(ValueError, match=r"state was made for a mega mixer of .* = \(6, "):
        mixer(x, None, ready(dim=6).init_state(2))
    with pytest.raises(ValueError, match="a mega mixer needs a state of its own, got LivingKeys"):
        mixer(x, None, build("dense", DIM, heads=2).init_state(2))


# Cost and settings


@pytest.mark.parametrize("length", [1, 7, 8, 9, 61, 64])
def test_closed_forms(length):
    d, z, e, n, chunk = DIM, 4, 6, 3, 8
    cost = ready(query_dim=z, value_dim=e, ema_dim=n, chunk=chunk).cost(length)
    whole, rest = divmod(length, chunk)
    pairs = whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    assert cost.pairs == pairs
    assert cost.parameters == d * e + e + (d + 1) * (2 * d + z + e) + e * d + d + 4 * d * n + d + 6 * z
    assert cost.flops == 2 * length * (2 * d * e + d * (2 * d + z + e)) + (4 * z + 2 * e) * pairs + 6 * length * d * n
    assert cost.state_bytes == 8 * d * n + rest * (z + e) * 8


def test_of_the_paper():
    """The mixers of its enwik8 model: 12 layers of d 512, z 128, E 1024; 39M with feed-forward layers of 1024."""
    mixer = build("mega", 512, query_dim=128, value_dim=1024, chunk=2048)
    layer = mixer.cost(8192).parameters + 2 * 512 * 1024
    assert 12 * layer + 256 * 512 == pytest.approx(39e6, rel=0.02)


@pytest.mark.parametrize("dim", range(1, 20))
def test_widths_fill_themselves_in(dim):
    mixer = build("mega", dim)
    assert mixer.query_dim % 2 == 0
    assert dim / 4 <= mixer.query_dim < dim / 4 + 2
    assert mixer.value_dim == 2 * dim
    assert mixer(torch.randn(1, 3, dim)).y.shape == (1, 3, dim)


MISTAKES = {
    "chunk must be >= 1, got 0": {"chunk": 0},
    "query_dim must be >= 2, got 0": {"query_dim": 0},
    "query_dim 5 must be even: the bias rotates pairs of features; nearest: 4, 6": {"query_dim": 5},
    "value_dim must be >= 1, got -1": {"value_dim": -1},
    "ema_dim must be >= 1, got 0": {"ema_dim": 0},
    "chunk must be a whole number or null, got 1.5": {"chunk": 1.5},
    r"no such setting of mega; did you mean chunk\?": {"chunks": 5},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(ValueError, match=message):
        build("mega", DIM, **MISTAKES[message])


def test_every_mistake_at_once():
    with pytest.raises(ValueError, match="chunk must be >= 1, got 0; ema_dim must be >= 1, got 0"):
        build("mega", DIM, chunk=0, ema_dim=0)


# Statistics


def test_what_is_worth_watching():
    mixer, x, seen = ready(), tokens(20), {}
    mixer(x, Context(statistics=seen))
    forgotten = mixer.ema.alpha.sigmoid() * mixer.ema.delta.sigmoid()
    update = torch.sigmoid(mixer.base(mixer.ema(x, None, None)[0])[..., :DIM])
    assert float(seen["memory_tokens"]) == pytest.approx(float((1 / forgotten).detach().mean()))
    assert float(seen["update_gate"]) == pytest.approx(float(update.detach().mean()))
    assert float(seen["saturated_decays"]) == 0
    assert set(seen) == {"memory_tokens", "saturated_decays", "update_gate", "reset_gate"}
    assert all(t.dim() == 0 and not t.requires_grad for t in seen.values())
    with torch.no_grad():
        mixer.ema.alpha[:, :4] = -40.0
        mixer.ema.alpha[:, 4:8] = 40.0
        mixer.ema.delta[:, 4:8] = 40.0
    mixer(x, Context(statistics=seen))
    assert float(seen["saturated_decays"]) == 0.5
    assert float(seen["memory_tokens"]) > 2.0**20
