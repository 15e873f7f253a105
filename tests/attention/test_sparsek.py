"""SPARSEK: its limits, how its scores learn, its costs, streams and statistics, and what is no number."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.clock import read_clock
from attention.kernels.plan import Plan, visited_pairs
from attention.lifetimes import Lifetimes, living_pairs
from attention.mixer import Context, Mixer, build, parameter_count, read_settings
from attention.ops.attend import KeySet, attend_union
from attention.sparsek import Candidates
from tests.conformance.oracle import load, masked_attention, multi_head_attention

ORACLE = load("sparsek")
DIM = 12
SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 4, "keep": 3, "window": 4}


def ready(**settings: Any) -> Mixer:
    """In float64, always from the same seed."""
    torch.manual_seed(0)
    return build("sparsek", DIM, **(SMALL | settings)).double()


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def gradients(y: Tensor, mixer: Mixer) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), list(mixer.parameters())))


def assert_is_its_definition(mixer: Mixer, x: Tensor) -> None:
    y, expected = mixer(x).y, ORACLE.definition(mixer, x, Context())
    assert_close(y, expected)
    for ours, theirs in zip(gradients(y, mixer), gradients(expected, mixer), strict=True):
        assert_close(ours, theirs, atol=1e-10 * max(1.0, float(theirs.abs().max())))


# Whom it selects


@pytest.mark.parametrize("settings", [{}, {"window": 0, "keep": 9}, {"candidates": 400, "score_scale": 1.0}], ids=str)
def test_over_many_tiles_it_is_its_definition(settings: dict[str, Any]) -> None:
    assert_is_its_definition(ready(**settings), tokens(200, batch=1))


@pytest.mark.parametrize("settings", [{}, {"window": 0}, {"slope": 0.01}], ids=str)
def test_scores_that_tie(settings: dict[str, Any]) -> None:
    """Three different tokens only; where their c lies between 0 and 1, that of equals is equal."""
    mixer = ready(score_scale=0.3, **settings)
    assert_is_its_definition(mixer, tokens(3)[:, torch.randint(3, (60,))])


def test_the_shares_of_the_older_sum_to_keep() -> None:
    mixer, x = ready(), tokens(60)
    c = ORACLE.gates(mixer, x)
    older = (torch.arange(60)[:, None] - torch.arange(60)) >= 4
    assert_close((c * older).sum(-1)[..., 12:], torch.full((2, 4, 48), 3.0, dtype=torch.float64))


def test_as_many_candidates_as_are_kept_are_selected_hard() -> None:
    """The best `keep` of the older ones, whole; the scores learn nothing."""
    mixer, x = ready(candidates=3), tokens(60, batch=1)
    scores = ORACLE.scores(mixer, x)[0].detach()
    age = torch.arange(60)[:, None] - torch.arange(60)
    met = ((age >= 0) & (age < 4)).repeat(2, 1, 1)
    for head in range(2):
        for t in range(60):
            best = sorted(range(max(0, t - 3)), key=lambda j: (float(scores[head, j]), j))[-3:]
            met[head, t, best] = True
    y = mixer(x).y
    assert_close(y, masked_attention(mixer, x, met.repeat_interleave(2, 0)))
    y.square().sum().backward()
    assert mixer.router.weight.grad is not None
    assert not mixer.router.weight.grad.any()


def test_one_kept_of_all_is_the_sparsemax_of_the_scores_so_far() -> None:
    """Martins and Astudillo (2016), by its own closed form; alone, without a window."""
    mixer = ready(heads=2, kv_heads=2, keep=1, candidates=500, window=0, score_scale=0.5)
    x = tokens(50, batch=1)
    u = ORACLE.scores(mixer, x)[0]
    c = torch.zeros(2, 50, 50, dtype=torch.float64)
    for head in range(2):
        for t in range(50):
            z = u[head, : t + 1].sort(descending=True).values
            size = int((1 + torch.arange(1, t + 2) * z > z.cumsum(0)).sum())
            c[head, t, : t + 1] = (u[head, : t + 1] - (z[:size].sum() - 1) / size).clamp(min=0)
    assert_close(c, ORACLE.gates(mixer, x)[0])
    assert_is_its_definition(mixer, x)


@pytest.mark.parametrize("settings", [{"keep": 40}, {"window": 40}, {"keep": 40, "window": 0}, {"keep": 37}], ids=str)
def test_what_keeps_all_is_dense(settings: dict[str, Any]) -> None:
    mixer, x = ready(**settings), tokens(40)
    assert_close(mixer(x).y, multi_head_attention(mixer, x, Context()))


def test_without_a_window_a_token_meets_itself_through_its_score() -> None:
    """Of two scores a step of 1 apart the worse one is not selected: its token does not even see itself."""
    mixer = ready(heads=1, kv_heads=1, keep=1, window=0, score_scale=1.0)
    with torch.no_grad():
        mixer.router.weight.zero_()
        mixer.router.weight[:, 0] = 1
    x = tokens(3, batch=1)
    x[0, :, 0] = torch.tensor([5.0, 1.0, 9.0])
    value = x @ mixer.qkv.weight[8:].T @ mixer.output.weight.T
    assert_close(mixer(x).y, value[:, [0, 0, 2]])


def test_constant_scores_share_alike() -> None:
    """Each of the last `candidates` older tokens has c = keep / candidates."""
    mixer, x = ready(candidates=6), tokens(40)
    with torch.no_grad():
        mixer.router.weight.zero_()
    c = ORACLE.gates(mixer, x)[0, 0, 39]
    assert c.tolist() == pytest.approx([0.0] * 30 + [0.5] * 6 + [1.0] * 4)
    assert_is_its_definition(mixer, x)


# How it learns, and in which precision


def test_the_scores_learn_what_small_changes_of_them_do() -> None:
    """The derivative along a random direction, through c and tau; no candidate's rank is near a change."""
    mixer, x = ready(score_scale=0.2), tokens(30)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)

    def loss() -> Tensor:
        return (mixer(x).y * weights).sum()

    (gradient,) = torch.autograd.grad(loss(), mixer.router.weight)
    assert gradient.abs().min() > 0
    direction, step = torch.randn_like(gradient), 1e-6
    with torch.no_grad():
        mixer.router.weight += step * direction
        above = loss()
        mixer.router.weight -= 2 * step * direction
        below = loss()
    assert float((above - below) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


def test_scores_are_not_rounded_to_16_bits() -> None:
    """Their difference is lost in bfloat16, in which the rest is computed."""
    mixer = ready().float()
    x = tokens(80).float()
    score = mixer.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mixer.scores(x, read_clock(x, None, None))
        y = mixer(x).y
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, 4.0 * score.transpose(1, 2))
    assert y.dtype == torch.bfloat16
    assert (y.float() - mixer(x).y).norm() < 2**-6 * mixer(x).y.norm()


def test_a_slope_prefers_who_comes_later() -> None:
    mixer, x = ready(slope=50.0), tokens(60)
    age = torch.arange(60)[:, None] - torch.arange(60)
    assert_close(mixer(x).y, masked_attention(mixer, x, (age >= 0) & (age < 4 + 3)))


def test_how_it_is_born() -> None:
    torch.manual_seed(0)
    mixer = build("sparsek", 256, heads=8, kv_heads=4)
    assert mixer.router.weight.shape == (4, 256)
    assert mixer.router.weight.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert mixer.router.weight.no_weight_decay
    assert mixer.output.weight.residual_output
    assert parameter_count(mixer) == 2 * 256 * 32 * (8 + 4) + 256 * 4
    assert mixer.config.most == 128


# Costs


@pytest.mark.parametrize("length", [1, 7, 10, 11, 60])
def test_the_bound_on_pairs_is_reached(length: int) -> None:
    """By scores so alike that all candidates have a share."""
    mixer, x = ready(score_scale=1e-9), tokens(length, batch=1)
    met = int((ORACLE.gates(mixer, x) > 0).sum())
    assert met == mixer.cost(length).pairs


def test_costs_are_the_closed_forms() -> None:
    """Beside dense: 2TdG flops of scores; rows of window and candidates, 8 bytes more each."""
    length, keep, window = 500, 16, 10
    cost = build("sparsek", 64, heads=4, kv_heads=2, keep=keep, window=window).cost(length)
    near = window * length - window * (window - 1) // 2
    older = length - window
    far = 2 * keep * older - 2 * keep * (2 * keep - 1) // 2
    assert cost.pairs == 4 * (near + far)
    assert cost.flops == 4 * length * 64 * 16 * (4 + 2) + 2 * length * 64 * 2 + 4 * 16 * cost.pairs
    assert cost.state_bytes == 2 * (window + 2 * keep) * (2 * 16 * 4 + 8)


def test_generations_spare_the_kernels_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visited over living pairs with tiles of 128, both passes: what the best edges reach, and a tenth more."""
    seen = []

    def watched(sets: list[KeySet], **given: Any) -> tuple[Tensor, Tensor]:
        seen.extend(one.life for one in sets)
        return attend_union(sets, **given)

    monkeypatch.setattr("attention.sparsek.attend_union", watched)
    torch.manual_seed(0)
    build("sparsek", 8, heads=1, head_dim=4, keep=256, window=0)(torch.randn(1, 8192, 8))
    (life,) = seen
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1}
    pairs = living_pairs(life, None, **sizes, num_queries=8192, num_keys=8192)
    time = torch.arange(8192, dtype=torch.int32)
    visited = [
        v / pairs for v in visited_pairs(Plan(life, time, kv_heads=1, num_keys=8192), 128, 128, batch=1, heads=1)
    ]
    one = Lifetimes(life.birth, life.death)
    alone = [v / pairs for v in visited_pairs(Plan(one, time, kv_heads=1, num_keys=8192), 128, 128, batch=1, heads=1)]
    print(f"visited / living {visited}, in one generation {alone}")
    assert all(v < 3 for v in visited)
    assert all(v > 2 * u for v, u in zip(alone, visited, strict=True))


# Streams


CHUNKS = [[1] * 60, [7, 1, 30, 22], [60]]
by_chunks = pytest.mark.parametrize("chunks", CHUNKS, ids=["by token", "ragged", "at once"])


@torch.no_grad()
def read(mixer: Mixer, x: Tensor, chunks: list[int], state: Candidates, positions: Tensor | None = None) -> Tensor:
    """y of x, given to the state in chunks."""
    places = [None] * len(chunks) if positions is None else positions.split(chunks, 1)
    parts = zip(x.split(chunks, 1), places, strict=True)
    return torch.cat([mixer(part, Context(positions=p), state).y for part, p in parts], 1)


@by_chunks
@pytest.mark.parametrize("settings", [{}, {"window": 0}, {"candidates": 100, "slope": 0.05}], ids=str)
def test_scores_that_tie_in_a_stream(chunks: list[int], settings: dict[str, Any]) -> None:
    mixer = ready(score_scale=0.3, **settings)
    x = tokens(3)[:, torch.randint(3, (60,))]
    assert_close(read(mixer, x, chunks, mixer.init_state(2)), ORACLE.definition(mixer, x, Context()))


@by_chunks
@pytest.mark.parametrize("limit", [3, 9])
def test_a_limit_silences_keys_but_not_their_scores(chunks: list[int], limit: int) -> None:
    """Shorter than the window, and longer."""
    mixer, x = ready(), tokens(60)
    age = torch.arange(60)[:, None] - torch.arange(60)
    c = ORACLE.gates(mixer, x) * (age < limit)
    assert_close(read(mixer, x, chunks, mixer.init_state(2, limit)), ORACLE.gated(mixer, x, c))


@by_chunks
@pytest.mark.parametrize("window", [0, 4, 30])
def test_rows_of_a_stream_start_their_documents_apart(chunks: list[int], window: int) -> None:
    mixer, x = ready(window=window), tokens(60)
    starts = torch.tensor([[0, 20, 41], [0, 7, 38]])
    time = torch.arange(60)
    positions = time - torch.where(starts[:, :, None] <= time, starts[:, :, None], 0).amax(1)
    y = read(mixer, x, chunks, mixer.init_state(2), positions)
    for row, cuts in enumerate(starts.tolist()):
        for start, stop in zip(cuts, [*cuts[1:], 60], strict=True):
            alone = ORACLE.definition(mixer, x[row : row + 1, start:stop], Context())
            assert_close(y[row : row + 1, start:stop], alone)


def test_a_state_holds_the_window_and_who_is_above_the_threshold() -> None:
    mixer, x = ready(), tokens(70, batch=1)
    state = mixer.init_state(1)
    read(mixer, x, [1] * 20 + [31, 9, 10], state)
    c = ORACLE.gates(mixer, x)[0, ::2, 69]
    for head in range(2):
        expected = [t for t in range(70) if c[head, t] > 0 or t == 66]  # 66 is in the window of the last query
        time = state.rows["time"][0, head]
        assert time[time < 2**31 - 1].tolist() == expected
    assert state.bytes == int((state.rows["time"] < 2**31 - 1).sum()) * (2 * 4 * 8 + 8)
    assert state.bytes <= state.capacity


def test_gradients_of_a_segment_are_those_of_its_tokens() -> None:
    """As of one pass; what is held has none."""
    mixer, x = ready(), tokens(40)
    state = mixer.init_state(2)
    with torch.no_grad():
        mixer(x[:, :25], None, state)
    last = x[:, 25:].clone().requires_grad_()
    mixer(last, None, state).y.square().sum().backward()
    whole = x.clone().requires_grad_()
    mixer(whole).y[:, 25:].square().sum().backward()
    assert_close(last.grad, whole.grad[:, 25:], atol=1e-10)


# What is worth watching


@pytest.mark.parametrize("settings", [{}, {"score_scale": 0.05}, {"window": 0, "candidates": 60}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_statistics(settings: dict[str, Any], packed: bool) -> None:
    mixer, x, watched = ready(**settings), tokens(60), {}
    cuts = [0, 25, 60] if packed else [0, 60]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(cuts)]).expand(2, -1)
    mixer(x, Context(positions=positions, statistics=watched))
    window = mixer.config.window
    support = alive = interior = bind = 0
    for start, stop in itertools.pairwise(cuts):
        c = ORACLE.gates(mixer, x[:, start:stop]).detach()[:, ::2]
        age = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        far = c * (age >= window)
        support += int((far > 0).sum())
        alive += int((c > 0).sum())
        interior += int(((far > 0) & (far < 1)).sum())
        for scores in ORACLE.scores(mixer, x[:, start:stop]).flatten(0, 1).tolist():
            for t in range(1, stop - start):
                now = ORACLE.candidates_at(mixer.config, scores, t)
                tau = ORACLE.threshold(mixer.config.keep, [scores[j] for j in now])
                rivals = {*ORACLE.candidates_at(mixer.config, scores, t - 1), t - window}
                bind += any(j >= 0 and scores[j] > tau for j in rivals - set(now))
    queries = 2 * 2 * 60
    assert float(watched["support"]) == pytest.approx(support / queries)
    assert float(watched["alive_keys"]) == pytest.approx(alive / queries)
    assert float(watched["interior_share"]) == pytest.approx(interior / support)
    assert float(watched["candidates_bind_share"]) == pytest.approx(bind / queries)


def test_statistics_of_a_stream_are_of_the_new_tokens() -> None:
    mixer, x = ready(score_scale=0.3), tokens(60)
    totals = dict.fromkeys(["support", "alive_keys", "candidates_bind_share"], 0.0)
    state = mixer.init_state(2)
    for part in x.split([7, 1, 30, 22], 1):
        watched: dict[str, Tensor] = {}
        mixer(part, Context(statistics=watched), state)
        for name in totals:
            totals[name] += float(watched[name]) * part.shape[1] / 60
    whole: dict[str, Tensor] = {}
    mixer(x, Context(statistics=whole))
    assert totals == pytest.approx({name: float(whole[name]) for name in totals})
    assert totals["candidates_bind_share"] > 0


# What is no number


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", [{}, {"window": 0}], ids=str)
def test_what_is_no_number_is_not_hidden(value: float, settings: dict[str, Any]) -> None:
    mixer, x = ready(**settings), tokens(90)
    x[0, 40, 2] = value
    x.requires_grad_()
    y = mixer(x).y
    assert y[0, 40].isnan().all()
    assert y[1].isfinite().all()
    y.sum().backward()
    state = mixer.init_state(2)
    assert read(mixer, x.detach(), [39, 1, 1, 49], state)[0, 40].isnan().all()


def test_scores_that_are_no_number_are_not_hidden() -> None:
    """Of finite tokens: a selection by them is none, even where nobody could be selected."""
    mixer, x = ready(), tokens(30)
    with torch.no_grad():
        mixer.router.weight[0, 0] = torch.nan
    assert mixer(x).y[:, 4:].isnan().all()


# Settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep": 0}, ("keep", "keep must be >= 1, got 0")),
        ({"window": -1}, ("window", "window must be >= 0, got -1")),
        ({"keep": 8, "candidates": 7}, ("candidates", "candidates 7 must be >= keep 8, or null")),
        ({"candidates": 0}, ("candidates", "candidates 0 must be >= keep 3, or null")),
        ({"score_scale": 0.0}, ("score_scale", "score_scale must be > 0, got 0.0")),
        ({"score_scale": -1.0}, ("score_scale", "score_scale must be > 0, got -1.0")),
        ({"score_scale": float("nan")}, ("score_scale", "score_scale must be a number, got nan")),
        ({"slope": -0.1}, ("slope", "slope must be >= 0, got -0.1")),
        ({"slope": float("inf")}, ("slope", "slope must be a number, got inf")),
        ({"kv_heads": 3}, ("kv_heads", "kv_heads 3 does not divide heads 4; nearest: 2, 4")),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], expected: tuple[str, str]) -> None:
    assert read_settings("sparsek", DIM, SMALL | settings)[1] == [expected]


@pytest.mark.parametrize("settings", [{"window": 0}, {"keep": 1, "candidates": 1}, {"slope": 0.5}], ids=str)
def test_settings_that_fit(settings: dict[str, Any]) -> None:
    mixer = build("sparsek", DIM, **(SMALL | settings))
    assert mixer(torch.randn(1, 9, DIM)).y.isfinite().all()
