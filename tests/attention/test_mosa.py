"""MoSA: whom its heads choose, what follows at the limits, its costs and streams, and what the published one sees."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention.clock import Clock
from attention.kernels.plan import Plan, visited_pairs
from attention.lifetimes import Lifetimes, living_pairs
from attention.mixer import Context, Mixer, build, parameter_count, read_settings
from attention.mosa import ChosenKeys
from lmtrain.config import ModelConfig
from lmtrain.model import DecoderLM
from tests.conformance.checks import check_entropy_floor, check_future, check_prefixes
from tests.conformance.oracle import load

ORACLE = load("mosa")
DIM = 16
SMALL = {"heads": 3, "head_dim": 4, "keep": 5}


def ready(**settings: Any) -> Mixer:
    """In float64, always from the same seed."""
    torch.manual_seed(0)
    return build("mosa", DIM, **(SMALL | settings)).double()


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scored(mixer: Mixer, scores: Tensor) -> Tensor:
    """Tokens [1, T, d] whose first feature is their score [T] in every head; the others are random."""
    with torch.no_grad():
        mixer.router.weight.zero_()
        mixer.router.weight[:, 0] = 1
    x = tokens(len(scores), batch=1)
    x[..., 0] = scores
    return x


def assert_close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def gradients(y: Tensor, mixer: Mixer) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), list(mixer.parameters())))


# Whom a head chooses


@pytest.mark.parametrize("settings", [{}, {"include_first": False}, {"keep": 2}, {"keep": 60}], ids=str)
def test_over_many_tiles_it_is_its_definition(settings: dict[str, Any]) -> None:
    mixer, x = ready(**settings), tokens(300)
    y, expected = mixer(x).y, ORACLE.definition(mixer, x, Context())
    assert_close(y, expected)
    for ours, theirs in zip(gradients(y, mixer), gradients(expected, mixer), strict=True):
        assert_close(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("include_first", [True, False])
def test_scores_that_tie(include_first: bool) -> None:
    """Three different tokens only: a head keeps the last ones of its favourite."""
    mixer = ready(include_first=include_first)
    x = tokens(3)[:, torch.randint(3, (50,))]
    y, expected = mixer(x).y, ORACLE.definition(mixer, x, Context())
    assert_close(y, expected)
    for ours, theirs in zip(gradients(y, mixer), gradients(expected, mixer), strict=True):
        assert_close(ours, theirs, atol=1e-10)


def test_the_sigmoid_of_a_score_does_not_decide() -> None:
    """Beyond 37 it is 1 for all: they would tie."""
    mixer = ready(heads=1, keep=1, include_first=False)
    y = mixer(scored(mixer, torch.tensor([40.0, 60.0, 50.0]))).y
    assert y[0].abs().sum(-1).gt(0).tolist() == [True, True, False]


def test_as_many_are_active_as_are_better_than_before() -> None:
    """Ever better ones all, ever worse ones the first few: no capacity drops anybody, in a batch with both."""
    mixer = ready(include_first=False)
    rising = torch.arange(40.0)
    x = torch.cat([scored(mixer, rising), scored(mixer, -rising)])
    y = mixer(x).y
    assert y[0].abs().sum(-1).gt(0).all()
    assert y[1].abs().sum(-1).gt(0).tolist() == [True] * 5 + [False] * 35
    assert_close(y, ORACLE.definition(mixer, x, Context()))
    assert all(g.isfinite().all() for g in gradients(y, mixer))


def test_the_first_token_is_kept_however_it_scores() -> None:
    mixer = ready(heads=1, keep=2, rotary=0.0)
    x = scored(mixer, torch.tensor([-9.0, 1.0, 2.0, 3.0])).requires_grad_()
    y = mixer(x).y
    (to_x,) = torch.autograd.grad(y[0, 3].square().sum(), x)
    assert to_x[0].abs().sum(-1).gt(0).tolist() == [True, False, False, True]


def test_scores_are_not_rounded_to_16_bits() -> None:
    """Their difference is lost in bfloat16, in which the rest is computed."""
    mixer = ready(heads=1, keep=1, include_first=False).float()
    x = scored(mixer, torch.tensor([1.001, 1.0])).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x).y
    assert y.dtype == torch.bfloat16
    assert y[0].abs().sum(-1).gt(0).tolist() == [True, False]


def test_who_is_not_chosen_teaches_the_router_nothing() -> None:
    """The router learns through the gate: of active tokens, and not through whom they met."""
    mixer, x = ready(heads=1, include_first=False), tokens(30, batch=1)
    score = mixer.scores(x)[0, 0].detach()
    active = torch.tensor([t in ORACLE.kept(mixer.config, score.tolist(), t) for t in range(30)])
    y = mixer(x).y
    (to_router,) = torch.autograd.grad((y[0] * y[0].detach()).sum(), mixer.router.weight)
    ungated = y[0].detach() / score.sigmoid()[:, None]
    slope = score.sigmoid() * (1 - score.sigmoid())
    expected = ((y[0].detach() * ungated).sum(-1) * slope)[:, None] * x[0]
    assert 0 < active.sum() < 30
    assert_close(to_router[0], expected[active].sum(0))


def test_as_many_keys_live_as_are_kept() -> None:
    mixer, x = ready(), tokens(40)
    death = mixer.deaths(mixer.scores(x), Clock.plain(x.shape[1]))
    time = torch.arange(40)
    living = ((time[:, None] >= time) & (time[:, None] < death[..., None, :])).sum(-1)
    assert torch.equal(living, (time + 1).clamp(max=5).expand_as(living))


# Limits


def test_constant_scores_make_a_window() -> None:
    mixer, x = ready(include_first=False), tokens(40)
    with torch.no_grad():
        mixer.router.weight.zero_()
    distance = torch.arange(40)[:, None] - torch.arange(40)
    window = ((distance >= 0) & (distance < 5)).expand(2, -1, -1)
    assert_close(mixer(x).y, sum(ORACLE.attention(mixer, x, window, head) for head in range(3)))


def test_the_best_one_alone_meets_itself() -> None:
    mixer, x = ready(heads=1, keep=1, include_first=False), tokens(40, batch=1)
    score = mixer.scores(x)[0, 0]
    record = score >= score.cummax(0).values
    value = x[0] @ mixer.qkv[0, :, 8:] @ mixer.output[0]
    assert_close(mixer(x).y[0], (record * score.sigmoid())[:, None] * value)
    assert 1 < record.sum() < 20


@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_no_longer_than_what_is_kept(length: int) -> None:
    """All tokens are served, and nobody leaves."""
    mixer, x = ready(keep=7), tokens(length)
    everyone = torch.ones(length, length).tril().bool().expand(2, -1, -1)
    assert_close(mixer(x).y, sum(ORACLE.attention(mixer, x, everyone, head) for head in range(3)))


# Weights and costs


def test_how_it_is_born() -> None:
    torch.manual_seed(0)
    mixer = build("mosa", 64, heads=32, head_dim=32)
    assert mixer.qkv.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert mixer.output.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert mixer.router.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert mixer.router.weight.no_weight_decay
    assert mixer.output.residual_output
    assert parameter_count(mixer) == 32 * (4 * 64 * 32 + 64)
    assert set(mixer.state_dict()) == {"router.weight", "qkv", "output"}  # positions are no part of a checkpoint
    assert build("mosa", 48).head_dim == 48


def test_costs_are_the_closed_forms() -> None:
    """With H_n the n-th harmonic number, E[active] = k + k (H_T - H_k)."""
    heads, keep, dim, width, length = 2, 16, 64, 8, 256
    cost = build("mosa", dim, heads=heads, keep=keep, head_dim=width, include_first=False).cost(length)
    later = sum(1 / t for t in range(keep + 1, length + 1))
    active, pairs = keep + keep * later, keep * (keep + 1) / 2 + keep**2 * later
    assert active == pytest.approx(59.90, abs=5e-3)
    assert cost.pairs == pytest.approx(heads * pairs)
    products = heads * (8 * dim * width * active + 2 * length * dim)
    assert cost.flops == pytest.approx(products + 4 * width * heads * pairs)
    assert cost.state_bytes == heads * keep * (2 * width * 4 + 8)


def test_as_many_are_active_as_expected() -> None:
    x = tokens(256, batch=40)
    for include_first in (True, False):
        mixer = ready(heads=8, keep=16, include_first=include_first)
        active = (mixer.deaths(mixer.scores(x), Clock.plain(x.shape[1])) > torch.arange(256)).sum(-1).double().mean()
        assert float(active) == pytest.approx(mixer._expected(256)[0], rel=0.02)


@pytest.mark.parametrize(("keep", "goal"), [(512, 2.25), (1024, 1.79)])
def test_generations_spare_the_kernels_work(keep: int, goal: float) -> None:
    """Visited over living pairs with tiles of 128 at T = 65,536: what the best edges reach, and a tenth more."""
    torch.manual_seed(0)
    mixer = build("mosa", 8, heads=2, keep=keep, head_dim=4)
    x = torch.randn(1, 65536, 8)
    _, life = mixer.chosen(mixer.deaths(mixer.scores(x), Clock.plain(x.shape[1])), Clock.plain(x.shape[1]))
    assert set(life.generation.unique().tolist()) == {0, 1, 2, 3}
    count = life.birth.shape[-1]
    sizes = {"batch": 1, "heads": 2}
    pairs = living_pairs(life, life.birth, **sizes, kv_heads=2, num_queries=count, num_keys=count)
    plan = Plan(life, life.birth, kv_heads=2, num_keys=count)
    visited = [v / pairs for v in visited_pairs(plan, 128, 128, **sizes)]
    one = Plan(Lifetimes(life.birth, life.death, torch.zeros_like(life.birth)), life.birth, kv_heads=2, num_keys=count)
    print(
        f"keep {keep}: visited / living {visited}, in one generation {visited_pairs(one, 128, 128, **sizes)[0] / pairs}"
    )
    assert all(v < 1.1 * goal for v in visited)


# Streams


CHUNKS = [[1] * 60, [7, 1, 30, 22], [60]]
by_chunks = pytest.mark.parametrize("chunks", CHUNKS, ids=["by token", "ragged", "at once"])


@torch.no_grad()
def read(mixer: Mixer, x: Tensor, chunks: list[int], state: ChosenKeys, positions: Tensor | None = None) -> Tensor:
    """y of x, given to the state in chunks."""
    places = [None] * len(chunks) if positions is None else positions.split(chunks, 1)
    parts = zip(x.split(chunks, 1), places, strict=True)
    return torch.cat([mixer(part, Context(positions=p), state).y for part, p in parts], 1)


def age(length: int) -> Tensor:
    return torch.arange(length)[:, None] - torch.arange(length)


@by_chunks
@pytest.mark.parametrize("include_first", [True, False])
def test_scores_that_tie_in_a_stream(chunks: list[int], include_first: bool) -> None:
    mixer = ready(include_first=include_first)
    x = tokens(3)[:, torch.randint(3, (60,))]
    assert_close(read(mixer, x, chunks, mixer.init_state(2)), ORACLE.definition(mixer, x, Context()))


@by_chunks
def test_a_limit_silences_keys_but_frees_no_place(chunks: list[int]) -> None:
    mixer, x = ready(), tokens(60)
    expected = torch.zeros_like(x)
    for head in range(3):
        met = torch.stack([ORACLE.mask(mixer.config, row) for row in (x @ mixer.router.weight[head]).detach()])
        expected = expected + ORACLE.attention(mixer, x, met & (age(60) < 9), head)
    assert_close(read(mixer, x, chunks, mixer.init_state(2, limit=9)), expected)


@by_chunks
def test_rows_of_a_stream_start_their_documents_apart(chunks: list[int]) -> None:
    mixer, x = ready(keep=3), tokens(60)
    starts = torch.tensor([[0, 20, 41], [0, 7, 38]])
    time = torch.arange(60)
    positions = time - torch.where(starts[:, :, None] <= time, starts[:, :, None], 0).amax(1)
    y = read(mixer, x, chunks, mixer.init_state(2), positions)
    for row, cuts in enumerate(starts.tolist()):
        for start, stop in zip(cuts, [*cuts[1:], 60], strict=True):
            alone = ORACLE.definition(mixer, x[row : row + 1, start:stop], Context())
            assert_close(y[row : row + 1, start:stop], alone)


def test_a_state_ends_at_what_is_kept() -> None:
    mixer, x = ready(), tokens(500, batch=1)
    state = mixer.init_state(1)
    for length in range(1, 501):
        read(mixer, x[:, length - 1 : length], [1], state)
        assert state.bytes == mixer.cost(length).state_bytes
    rows = 3 * 5
    assert state.bytes == rows * (2 * 4 * 8 + 8)
    assert state.capacity == rows * (2 * 4 * 8 + 3 * 8)


def test_a_state_holds_who_is_best_so_far() -> None:
    mixer, x = ready(), tokens(70, batch=1)
    state = mixer.init_state(1)
    read(mixer, x, [1] * 20 + [31, 9, 10], state)
    for head in range(3):
        score = (x[0] @ mixer.router.weight[head]).tolist()
        assert state.rows["birth"][0, head].tolist() == sorted(ORACLE.kept(mixer.config, score, 69))


# The published selection


def published(**settings: Any) -> Mixer:
    return ready(selection="paper", **settings)


def definition_of_the_paper(mixer: Mixer, x: Tensor) -> Tensor:
    """Of each head the best of all tokens, in order, attend causally among themselves."""
    config, y = mixer.config, torch.zeros_like(x)
    for head in range(config.heads):
        score = x @ mixer.router.weight[head]
        outs = []
        for row, scores in zip(x, score.tolist(), strict=True):
            best = sorted(ORACLE.kept(config, scores, len(row) - 1))
            met = torch.zeros(len(row), len(row), dtype=torch.bool)
            for place, token in enumerate(best):
                met[token, best[: place + 1]] = True
            outs.append(ORACLE.attention(mixer, row[None], met, head))
        y = y + torch.cat(outs)
    return y


@pytest.mark.parametrize("length", [1, 3, 17, 200])
@pytest.mark.parametrize("include_first", [True, False])
def test_the_published_one_is_its_definition(length: int, include_first: bool) -> None:
    mixer, x = published(include_first=include_first), tokens(length)
    y, expected = mixer(x).y, definition_of_the_paper(mixer, x)
    assert_close(y, expected, atol=1e-10)
    for ours, theirs in zip(gradients(y, mixer), gradients(expected, mixer), strict=True):
        assert_close(ours, theirs, atol=1e-10)


def test_the_published_one_is_dense_if_it_keeps_all() -> None:
    strict, paper = ready(keep=40), published(keep=40)
    assert_close(paper(tokens(40)).y, strict(tokens(40)).y)


def test_the_published_one_sees_ahead_though_no_gradient_shows_it() -> None:
    mixer, x = published(heads=2, keep=3), tokens(17).requires_grad_()
    assert mixer.causality == "selects_ahead"
    assert ready().causality == "strict"
    (to_x,) = torch.autograd.grad(mixer(x).y[:, :9].sum(), x)
    assert not to_x[:, 9:].any()
    with pytest.raises(AssertionError, match=r"tokens from \d+ on change an earlier output"):
        check_future(mixer, DIM, 17)
    with pytest.raises(AssertionError, match=r"a prefix of \d+ tokens ends"):
        check_prefixes(mixer, DIM, 17)


def test_what_the_published_one_costs() -> None:
    """Its authors count 4 D k^2 for attention, which is causal, and the gate."""
    heads, keep, dim, width, length = 3, 5, DIM, 4, 100
    cost = published().cost(length)
    assert cost.pairs == heads * keep * (keep + 1) / 2
    assert cost.flops == heads * (8 * dim * width * keep + 2 * length * dim) + 4 * width * cost.pairs
    assert published().cost(4).pairs == heads * 4 * 5 / 2


def test_the_published_one_refuses_streams_and_packed_documents() -> None:
    mixer, x = published(), tokens(20)
    with pytest.raises(ValueError, match="mosa with selection paper has no state"):
        mixer.init_state(2)
    with pytest.raises(ValueError, match="mosa with selection paper has no state"):
        mixer(x, None, ready().init_state(2))
    two = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    ends = torch.tensor([12] * 12 + [20] * 8).expand(2, -1)
    for packed in (Context(positions=two), Context(document_ends=ends)):
        with pytest.raises(ValueError, match=r"mosa with selection paper .* takes no packed documents"):
            mixer(x, packed)
    whole = Context(positions=torch.arange(20).expand(2, -1), document_ends=torch.full((2, 20), 20))
    assert_close(mixer(x, whole).y, mixer(x).y)


def test_a_model_with_the_published_one_says_so() -> None:
    mixers = {
        "far": {"kind": "mosa", **SMALL, "selection": "paper"},
        "near": {"kind": "local", "heads": 2, "window": 4},
    }
    config = ModelConfig(dim=16, layers=2, ffn_dim=32, vocab_size=5, mixers=mixers, pattern="near near+far")
    assert DecoderLM(config).causality == "selects_ahead"


@pytest.mark.slow
def test_the_published_one_predicts_noise() -> None:
    """The strict one does not: `tests/conformance/test_causality.py`."""
    mixers = {"it": {"kind": "mosa", "heads": 16, "head_dim": 8, "keep": 8, "selection": "paper"}}
    config = ModelConfig(dim=48, layers=2, ffn_dim=64, vocab_size=4, mixers=mixers, pattern="it")
    with pytest.raises(AssertionError, match="lies below ln 4"):
        check_entropy_floor(config, steps=300)


# What is no number


@pytest.mark.parametrize("settings", [{}, {"include_first": False}, {"selection": "paper"}], ids=str)
def test_what_is_no_number_is_not_hidden(settings: dict[str, Any]) -> None:
    """Its score is worse than any other, so no head chooses it: y would be 0."""
    mixer, x = ready(**settings), tokens(60)
    x[0, 40, 2] = torch.nan
    y = mixer(x.requires_grad_()).y
    assert y[0, 40].isnan().all()
    assert y[1].isfinite().all()
    y.sum().backward()


def test_what_is_no_number_is_not_hidden_in_a_stream() -> None:
    mixer, x = ready(), tokens(60)
    x[0, 40, 2] = torch.nan
    assert read(mixer, x, [39, 1, 1, 19], mixer.init_state(2))[0, 40].isnan().all()


def test_scores_that_are_no_number_are_not_hidden() -> None:
    mixer = ready()
    with torch.no_grad():
        mixer.router.weight[0, 0] = torch.nan
    assert mixer(tokens(60)).y.isnan().all()


# Settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep": 1}, ("keep", "keep 1 must be >= 2 while include_first is true; or set it to false")),
        ({"keep": 0}, ("keep", "keep must be >= 1, got 0")),
        ({"rotary": 0.5}, ("rotary", "rotary must be a base > 1, or 0 = off; got 0.5")),
        ({"rotary_fraction": 1.5}, ("rotary_fraction", "rotary_fraction must be <= 1, got 1.5")),
        (
            {"head_dim": 10},
            ("rotary_fraction", "rotary_fraction 0.5 of 10 features must be an even number, got 5"),
        ),
        ({"selection": "best"}, ("selection", "selection must be strict or paper, got 'best'")),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], expected: tuple[str, str]) -> None:
    assert read_settings("mosa", DIM, settings)[1] == [expected]


@pytest.mark.parametrize(
    "settings",
    [{"keep": 1, "include_first": False}, {"head_dim": 10, "rotary": 0.0}, {"rotary_fraction": 0.0}],
    ids=str,
)
def test_settings_that_fit(settings: dict[str, Any]) -> None:
    mixer = build("mosa", DIM, **settings)
    assert mixer(torch.randn(1, 9, DIM)).y.isfinite().all()
