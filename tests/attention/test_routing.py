"""Routing: its two selections, its centroids, its limits, and what other implementations got wrong."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention.mixer import Context, Mixer, build, read_settings
from attention.routing import Routing
from lmtrain.config import ModelConfig
from tests.conformance.checks import check_entropy_floor, check_future
from tests.conformance.oracle import heads, load, rotate
from tests.conformance.sequences import Packing, Tokens

ORACLE = load("routing")
DIM = 16


def ready(**settings: Any) -> Routing:
    """In float64, always from the same seed."""
    torch.manual_seed(0)
    mixer = build("routing", DIM, **{"heads": 2, "clusters": 3, "window": 4} | settings).double()
    assert isinstance(mixer, Routing)
    return mixer


def tokens(length: int, seed: int = 1) -> Tensor:
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clusters_of(mixer: Routing, x: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors [B, H, T, D] that are queries and keys, and their clusters [B, H, T], by loops."""
    c = ORACLE.shared_vectors(mixer, x)
    means = mixer.centroids.means
    rows = [[[ORACLE.nearest(t.detach(), means[h]) for t in c[b, h]] for h in range(2)] for b in range(len(c))]
    return c, torch.tensor(rows)


def same(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# Limits


@pytest.mark.parametrize("window", [1, 5, 50])
def test_one_cluster_is_a_sliding_window(window: int) -> None:
    """`local`, if its queries and keys were the shared vectors."""
    mixer, x = ready(clusters=1, window=window), tokens(50)
    qk = rotate(ORACLE.shared_vectors(mixer, x), 10000.0)
    distance = torch.arange(50)[:, None] - torch.arange(50)
    logits = (qk @ qk.transpose(-1, -2) / math.sqrt(8)).masked_fill((distance < 0) | (distance >= window), -torch.inf)
    out = logits.softmax(-1) @ heads(x, mixer.value.weight, 2)
    same(mixer(x).y, out.transpose(1, 2).flatten(2) @ mixer.output.weight.T)


def test_a_window_of_one_is_the_value() -> None:
    mixer, x = ready(window=1), tokens(30)
    same(mixer(x).y, x @ mixer.value.weight.T @ mixer.output.weight.T)


def test_of_equal_clusters_a_token_takes_the_first() -> None:
    """Centroids at 0 are equally near to every token: all take the first of them, or, turned away from it, the next."""
    mixer, x = ready(window=9), tokens(40)
    first = mixer.centroids.means[:, 0].clone()
    for centroid, taken in ((torch.zeros_like(first), 1), (first, 2)):
        mixer.centroids.means.zero_()[:, 0] = centroid
        mixer(x).y.sum().backward()
        numbers = mixer.centroids.pending[..., -1]
        assert ((numbers > 0).sum(-1) == taken).all()
        assert not numbers[:, taken:].any()
        same(mixer(x).y, ORACLE.definition(mixer, x, Context()))
        mixer.after_step(skipped=True)


def test_over_many_tiles_it_is_its_definition() -> None:
    mixer, x = ready(clusters=5, window=40), tokens(500).requires_grad_()
    y, expected = mixer(x).y, ORACLE.definition(mixer, x, Context())
    same(y, expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    same(ours, theirs, atol=1e-10)


# Centroids


def test_centroids_start_and_stay_as_long_as_tokens() -> None:
    """Tokens have the norm D^1/2. Moving averages that start at 0 took norms from 2.8 to 237 in two steps."""
    mixer = ready(decay=0.999)
    assert mixer.centroids.means.shape == (2, 3, 8)
    norm = math.sqrt(8)
    same(mixer.centroids.means.norm(dim=-1), torch.full((2, 3), norm, dtype=torch.float64), atol=1e-4)
    for seed in range(10):
        mixer(tokens(60, seed)).y.sum().backward()
        mixer.after_step()
        assert mixer.centroids.means.norm(dim=-1).max() <= norm + 1e-6


def test_a_step_moves_each_centroid_towards_its_tokens() -> None:
    mixer = ready(decay=0.9)
    batches = [tokens(30, seed) for seed in (1, 2)]
    before = mixer.centroids.means.clone()
    expected = before.clone()
    for h in range(2):
        for j in range(3):
            mine = torch.cat([c[:, h][a[:, h] == j] for c, a in (clusters_of(mixer, x) for x in batches)])
            expected[h, j] += 0.1 * (mine - expected[h, j]).sum(0) / (0.9 + 0.1 * len(mine))
    for x in batches:
        mixer(x).y.sum().backward()
        assert torch.equal(mixer.centroids.means, before)
    mixer.after_step()
    same(mixer.centroids.means, expected)
    mixer.after_step(skipped=True)
    same(mixer.centroids.means, expected)


@pytest.mark.parametrize("selection", ["strict", "paper"])
def test_evaluation_comes_first_and_teaches_nothing(selection: str) -> None:
    """Also where somebody asks for gradients of an evaluation; what the context says of training prevails."""
    mixer, x = ready(selection=selection), tokens(20)
    output = mixer.eval()(x)
    assert output.losses == {}
    output.y.sum().backward()
    mixer.train()(x, Context(training=False)).y.sum().backward()
    assert not mixer.centroids.pending.any()
    mixer.eval()(x, Context(training=True)).y.sum().backward()
    assert float(mixer.centroids.pending[..., -1].sum()) == 2 * 2 * 20


@pytest.mark.parametrize("selection", ["strict", "paper"])
def test_the_loss_draws_tokens_to_their_centroids(selection: str) -> None:
    mixer, x = ready(selection=selection, commitment=0.3), tokens(20)
    c, cluster = clusters_of(mixer, x)
    centroid = torch.stack([torch.stack([mixer.centroids.means[h][a[h]] for h in range(2)]) for a in cluster])
    expected = 0.3 * sum((a - b) ** 2 for a, b in zip(c.flatten(), centroid.flatten(), strict=True)) / c.numel()
    loss = mixer(x).losses["commitment"]
    same(loss, expected)
    ours, theirs = (torch.autograd.grad(value, mixer.shared.weight)[0] for value in (loss, expected))
    same(ours, theirs)
    assert ours.abs().max() > 0


def test_no_gradient_asks_for_another_choice() -> None:
    assert {name for name, _ in ready().named_parameters()} == {"shared.weight", "value.weight", "output.weight"}


def test_in_16_bits_the_choice_is_that_of_float32() -> None:
    """Under autocast, and with the weights cast as some engines do."""
    mixer, x = ready().float(), tokens(300).float()
    with torch.no_grad():
        mixer.shared.weight.copy_(mixer.shared.weight.bfloat16())
        x = x.bfloat16().float()
    mixer(x).y.sum().backward()
    exact = mixer.centroids.pending.clone()
    mixer.after_step(skipped=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x).y
    y.sum().backward()
    assert torch.equal(mixer.centroids.pending, exact)
    mixer.after_step(skipped=True)
    mixer.bfloat16()(x.bfloat16()).y.sum().backward()
    assert torch.equal(mixer.centroids.pending, exact)


# State


def decoded(mixer: Mixer, x: Tensor, chunks: list[int], limit: int | None = None) -> Tensor:
    state = mixer.init_state(len(x), limit)
    with torch.no_grad():
        return torch.cat([mixer(part, None, state).y for part in x.split(chunks, 1)], 1)


@pytest.mark.parametrize("limit", [1, 7, 16])
def test_a_limit_is_one_of_time_however_the_stream_is_cut(limit: int) -> None:
    """Of the members of its cluster a query meets those fewer than `limit` tokens ago."""
    mixer, x = ready(window=6).eval(), tokens(60)
    c, cluster = clusters_of(mixer, x)
    qk, v = rotate(c, 10000.0), heads(x, mixer.value.weight, 2)
    rows = []
    for b in range(2):
        for h in range(2):
            for t in range(60):
                mates = [j for j in range(t + 1) if cluster[b, h, j] == cluster[b, h, t]][-6:]
                mates = [j for j in mates if t - j < limit]
                rows.append((qk[b, h, mates] @ qk[b, h, t] / math.sqrt(8)).softmax(0) @ v[b, h, mates])
    expected = torch.stack(rows).view(v.shape).transpose(1, 2).flatten(2) @ mixer.output.weight.T
    for chunks in ([1] * 60, [60], [7, 1, 1, 30, 2, 19]):
        same(decoded(mixer, x, chunks, limit), expected)


def test_the_state_is_a_ring_for_each_cluster() -> None:
    """At most window - 1 living rows of each, in a store that does not grow; it holds no more than tokens came."""
    mixer = ready(window=4).eval()
    state, row = mixer.init_state(1), (2 * 8 * 8 + 4)
    with torch.no_grad():
        for t in range(200):
            mixer(tokens(1, seed=t)[:1], None, state)
            assert state.bytes <= min(t + 1, 3 * 3) * 2 * row
            assert state.capacity == 2 * 3 * 3 * row
        assert state.bytes == state.capacity
        mixer(tokens(1)[:1], Context(positions=torch.zeros(1, 1, dtype=torch.int64)), state)
    assert state.bytes == 2 * row, "a new document must empty the rings"


# Costs


def test_one_cluster_costs_a_sliding_window() -> None:
    for length in (1, 3, 4, 5, 50):
        cost = ready(clusters=1, window=4).cost(length)
        assert cost.pairs == pytest.approx(2 * sum(min(i + 1, 4) for i in range(length)), rel=1e-12)


def test_pairs_lie_between_even_clusters_and_a_single_one() -> None:
    """C f(T / C) and f(T); over a long sequence even clusters come near."""

    def f(a: float) -> float:
        return 256 * a - 256 * 255 / 2 if a >= 256 else a * (a + 1) / 2

    for length in (64, 1000, 4096, 2**17):
        pairs = build("routing", 512).cost(length).pairs / 8
        assert 16 * f(length / 16) <= pairs * (1 + 1e-9)
        assert pairs <= f(length) * (1 + 1e-9)
    assert pairs == pytest.approx(16 * f(2**17 / 16), rel=1e-3)


def test_pairs_are_the_mean_over_random_clusters() -> None:
    length, window, number = 100, 20, 2000
    drawn = torch.randint(6, (number, length), generator=torch.Generator().manual_seed(0))
    same_cluster = (drawn[:, :, None] == drawn[:, None]).tril()
    met = same_cluster.sum(-1).clamp(max=window).sum(-1).double()
    stated = ready(clusters=6, window=window).cost(length).pairs / 2
    assert abs(float(met.mean()) - stated) < 4 * float(met.std()) / math.sqrt(number)


# The paper's selection


def paper_definition(mixer: Any, x: Tensor) -> Tensor:
    """Every cluster takes the `window` tokens nearest to it; a token's output is the mean over those that took it."""
    c = ORACLE.shared_vectors(mixer, x)
    qk, v = rotate(c, mixer.config.rotary), heads(x, mixer.value.weight, 2)
    length, rows = x.shape[1], []
    for b in range(len(x)):
        for h in range(2):
            outs: list[list[Tensor]] = [[] for _ in range(length)]
            for mu in mixer.centroids.means[h]:
                products = [float(t @ mu) for t in c[b, h].detach()]
                best = sorted(range(length), key=lambda t: -products[t])[: mixer.config.window]
                for t in best:
                    keys = sorted(j for j in best if j <= t)
                    logits = qk[b, h, keys] @ qk[b, h, t] / math.sqrt(8)
                    outs[t].append(logits.softmax(0) @ v[b, h, keys])
            rows += [sum(o) / len(o) if o else torch.zeros(8, dtype=torch.float64) for o in outs]
    return torch.stack(rows).view(v.shape).transpose(1, 2).flatten(2) @ mixer.output.weight.T


@pytest.mark.parametrize("length", [1, 3, 17, 70])
def test_paper_selection_is_its_definition(length: int) -> None:
    mixer, x = ready(selection="paper", window=9), tokens(length).requires_grad_()
    y, expected = mixer(x).y, paper_definition(mixer, x)
    same(y, expected, atol=1e-10)
    inputs = [x, *mixer.parameters()]
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        same(a, b, atol=1e-10)


def test_paper_selection_leaves_some_tokens_out() -> None:
    """Three clusters take 12 of 40 tokens at most; the others get exactly 0."""
    y = ready(selection="paper")(tokens(40)).y
    assert ((y == 0).all(-1).sum(-1) >= 40 - 2 * 12).all()


def test_paper_selection_sees_ahead() -> None:
    """The last token takes a place of another: a change of it shows in earlier outputs, in no gradient."""
    mixer = ready(selection="paper", clusters=2, window=8)
    assert mixer.causality == "selects_ahead"
    assert ready().causality == "strict"
    with pytest.raises(AssertionError, match="change an earlier output"):
        check_future(mixer, DIM, 30)
    x = tokens(30).requires_grad_()
    (to_input,) = torch.autograd.grad(mixer(x).y[:, :20].sum(), x)
    assert not to_input[:, 20:].any()


@pytest.mark.slow
def test_paper_selection_learns_to_predict_noise() -> None:
    """Independent tokens have ln 4 = 1.3863 nats; 300 steps go 0.010 below, which only later tokens can tell."""
    mixers = {"it": {"kind": "routing", "heads": 4, "clusters": 4, "window": 8, "selection": "paper"}}
    config = ModelConfig(dim=48, layers=2, ffn_dim=64, vocab_size=4, mixers=mixers, pattern="it")
    with pytest.raises(AssertionError, match="lies below ln 4"):
        check_entropy_floor(config, steps=300)


def test_paper_selection_has_no_state() -> None:
    with pytest.raises(ValueError, match=r"^routing with selection paper has no state: .*; .* selection strict$"):
        ready(selection="paper").init_state(1)


def test_paper_selection_refuses_packed_documents() -> None:
    mixer, x = ready(selection="paper"), Tokens.random(2, 20, DIM)
    packed = Packing([[20], [5, 15]])
    for name in ("positions", "document_ends"):
        with pytest.raises(ValueError, match=r"takes no packed documents; .* set selection strict$"):
            x.run(mixer, **packed.part(0, 20, name))
    alone = Packing([[20], [20]]).part(0, 20, "positions", "document_ends")
    same(x.run(mixer, **alone), x.run(mixer))


@pytest.mark.parametrize("length", [1, 5, 40])
def test_paper_selection_costs_what_is_counted(length: int) -> None:
    mixer, x = ready(selection="paper"), tokens(length)[:1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(x)
    cost = mixer.cost(length)
    assert counter.get_total_flops() == cost.flops
    assert cost.pairs == 2 * 3 * sum(range(1, min(4, length) + 1))
    assert cost.state_bytes == 0


# What is no number


@pytest.mark.parametrize("selection", ["strict", "paper"])
def test_what_is_no_number_is_not_hidden(selection: str) -> None:
    mixer, x = ready(selection=selection), tokens(60)
    x[0, 40, 2] = torch.nan
    out = mixer(x.requires_grad_())
    assert out.y[0, 40].isnan().all()
    assert out.y[1].isfinite().all()
    assert out.losses["commitment"].isnan()
    out.y.sum().backward()
    before = mixer.centroids.means.clone()
    mixer.after_step(skipped=True)
    assert torch.equal(mixer.centroids.means, before)


def test_what_is_no_number_is_not_hidden_in_a_stream() -> None:
    mixer, x = ready(), tokens(60)
    x[0, 40, 2] = torch.nan
    assert decoded(mixer, x, [39, 1, 1, 19])[0, 40].isnan().all()


def test_centroids_that_are_no_number_are_not_hidden() -> None:
    """All tokens take the first cluster; the loss tells."""
    mixer = ready()
    mixer.centroids.means.fill_(torch.nan)
    assert mixer(tokens(60)).losses["commitment"].isnan()


# Settings


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"clusters": 0}, "clusters", "clusters must be >= 1, got 0"),
        ({"window": 0}, "window", "window must be >= 1, got 0"),
        ({"decay": 1.0}, "decay", "decay must be < 1, got 1.0"),
        ({"commitment": -1}, "commitment", "commitment must be >= 0, got -1"),
        ({"selection": "ahead"}, "selection", "selection must be strict or paper, got 'ahead'"),
        ({"heads": 3}, "heads", "heads 3 does not divide dim 32; nearest: 2, 4 (or set head_dim)"),
        ({"head_dim": 5}, "head_dim", "head_dim 5 must be even while rotary is on"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], key: str, message: str) -> None:
    assert read_settings("routing", 32, settings)[1] == [(key, message)]


def test_queries_are_keys_so_heads_share_none() -> None:
    (problem,) = read_settings("routing", 32, {"kv_heads": 2})[1]
    assert problem[1].startswith("no such setting of routing")
