"""Combiner: every earlier token is met once, at the cost that the closed forms say, and in its limits it is dense."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention.clock import read_clock
from attention.combiner import Combiner, SpanCombiner
from attention.lifetimes import FOREVER
from attention.mixer import Context, Mixer, build, read_settings
from tests.conformance.oracle import load
from tests.conformance.sequences import Packing, Tokens, largest_difference

PATTERNS: dict[str, dict[str, Any]] = {
    "fixed": {"pattern": "fixed", "span": 4},
    "logsparse": {"pattern": "logsparse"},
    "axial": {"pattern": "axial", "span": 4},
}
DIM = 24

of_each_pattern = pytest.mark.parametrize("settings", PATTERNS.values(), ids=PATTERNS.keys())


def ready(**settings: Any) -> Mixer:
    """In float64, always from the same seed."""
    torch.manual_seed(0)
    return build("combiner", DIM, **settings).double()


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def effective(length: int, q: Tensor | None = None, **settings: Any) -> Tensor:
    """The matrix [H, T, T] that maps values to outputs: the values of the tokens are the unit vectors."""
    mixer = ready(heads=2, head_dim=length, rotary=settings.pop("rotary", 0.0), **settings)
    assert isinstance(mixer, Combiner)
    heads = (mixer.heads, mixer.kv_heads)
    x = normal(1, length, DIM)
    q, k = (normal(1, n, length, length, seed=seed) if q is None else q[:, :n] for seed, n in enumerate(heads))
    v = torch.eye(length, dtype=torch.float64).expand(1, mixer.kv_heads, -1, -1)
    return mixer.meet(x, q, k, v, read_clock(x, None, None), None)[0].detach()


# Full attention


@pytest.mark.parametrize("length", [1, 2, 4, 5, 16, 17, 24])
@of_each_pattern
def test_every_earlier_token_has_a_share_and_nobody_else(settings: dict[str, Any], length: int) -> None:
    """17 = 2^4 + 1 tokens need five levels: with ceil(log2(17 - 1)) of them the last token would meet itself only."""
    matrix = effective(length, **settings)
    assert float((matrix.sum(-1) - 1).abs().max()) < 1e-14
    assert torch.equal(matrix > 0, torch.ones(2, length, length).tril() > 0)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_blocks_off_the_diagonal_have_rank_one(kv_heads: int) -> None:
    """How a block's tokens share its weight is decided by the block alone, for all heads of a group alike."""
    span, matrix = 6, effective(24, pattern="fixed", span=6, kv_heads=kv_heads)
    for row in range(span, 24, span):
        for column in range(0, row, span):
            block = matrix[:, row : row + span, column : column + span]
            values = torch.linalg.svdvals(block)
            assert float(values[:, 1].max()) < 1e-14 < float(values[:, 0].min())
            shares = block / block.sum(-1, keepdim=True)
            assert float((shares - shares[:, :1]).abs().max()) < 1e-13
            assert (float((shares[0] - shares[1]).abs().max()) < 1e-13) == (kv_heads == 1)


@of_each_pattern
def test_with_bias_equal_logits_are_equal_shares(settings: dict[str, Any]) -> None:
    """Queries and keys of zero: a span of s tokens counts as s tokens."""
    length = 22
    zeros = torch.zeros(1, 2, length, length, dtype=torch.float64)
    if settings["pattern"] == "axial":
        zeros = zeros.expand_as(zeros)  # its keys are made of x: only the queries make the logits 0
    equal = effective(length, zeros, span_bias=True, **settings)
    expected = torch.ones(length, length, dtype=torch.float64).tril() / torch.arange(1, length + 1)[:, None]
    assert float((equal - expected).abs().max()) < 1e-14
    without = effective(length, zeros, **settings)
    assert float((without - expected).abs().max()) > 0.01


@pytest.mark.parametrize("span", [1, 21, 40])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_spans_of_one_token_or_of_all_are_dense_attention(span: int, kv_heads: int) -> None:
    mixer = ready(heads=4, kv_heads=kv_heads, span=span)
    torch.manual_seed(0)
    dense = build("dense", DIM, heads=4, kv_heads=kv_heads).double()
    x = normal(2, 21, DIM)
    assert largest_difference(mixer(x).y, dense(x).y) < 1e-13
    one, many = mixer.init_state(2), dense.init_state(2)
    with torch.no_grad():
        for t in range(21):
            y, expected = mixer(x[:, t : t + 1], None, one).y, dense(x[:, t : t + 1], None, many).y
            assert largest_difference(y, expected) < 1e-13


def test_a_row_of_one_token_or_of_all_is_nearly_dense() -> None:
    """Axial, span >= T: dense. Of one: kbar is made anew, so only the first token is as in dense attention."""
    x = normal(1, 9, DIM)
    torch.manual_seed(0)
    dense = build("dense", DIM, heads=3).double()
    assert largest_difference(ready(heads=3, pattern="axial", span=9)(x).y, dense(x).y) < 1e-13
    single = ready(heads=3, pattern="axial", span=1)(x).y
    assert largest_difference(single[:, :1], dense(x).y[:, :1]) < 1e-13
    assert largest_difference(single[:, 1:], dense(x).y[:, 1:]) > 1e-3


def test_keys_of_a_span_are_maxima() -> None:
    """Not sums along the span: with values of both signs a sum, unlike a maximum, sees every token."""
    mixer = ready(heads=2, span=4, head_dim=6)
    assert isinstance(mixer, SpanCombiner)
    clock = read_clock(normal(1, 8, DIM), None, None)
    plan = mixer.plan(clock, 0, None)
    q, k, v = (normal(1, 2, 8, 6, seed=seed) for seed in range(3))
    keys, _ = mixer.abstractions({"q": q, "k": k, "v": v}, mixer.turned(k, clock), plan.levels)
    lower = k.clone()
    lower[:, :, :4] = torch.where(k[:, :, :4] == k[:, :, :4].amax(2, keepdim=True), k[:, :, :4], -9.0)
    same, _ = mixer.abstractions({"q": q, "k": lower, "v": v}, mixer.turned(lower, clock), plan.levels)
    assert torch.equal(keys, same)


# Costs


def bit_count(length: int) -> int:
    """Set bits of all positions."""
    return sum(i.bit_count() for i in range(length))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 61, 64])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_closed_forms_of_fixed(length: int, kv_heads: int) -> None:
    span, width = 8, 6
    n, m = divmod(length, span)
    cost = ready(heads=4, kv_heads=kv_heads, span=span).cost(length)
    pairs = 4 * (n * span * (span + 1) // 2 + m * (m + 1) // 2 + span * n * (n - 1) // 2 + m * n)
    assert cost.pairs == pairs
    assert cost.parameters == 2 * DIM * width * (4 + kv_heads)
    assert cost.flops == 2 * length * cost.parameters + 4 * width * (pairs + kv_heads * n * span)
    rows = 2 * (m + n) + (m > 0)  # keys and values of tokens and abstractions; the largest query of the open block
    assert cost.state_bytes == rows * kv_heads * width * 8


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 17, 61, 64])
def test_closed_forms_of_logsparse(length: int) -> None:
    mixer, width = ready(heads=4, kv_heads=2, pattern="logsparse"), 6
    cost = mixer.cost(length)
    assert cost.pairs == 4 * (length + bit_count(length))
    made = sum(t & -t for t in range(2, length + 1) if t % 2 == 0)  # one span ends behind each token
    assert cost.flops == 2 * length * cost.parameters + 4 * width * (cost.pairs + 2 * made)
    assert cost.state_bytes == (3 * length + 2 * length.bit_count()) * 2 * width * 8
    assert isinstance(mixer, SpanCombiner)
    assert mixer.pattern(length).birth.shape[-1] == 2 * length


@pytest.mark.parametrize("length", [1, 7, 8, 9, 61, 64])
def test_closed_forms_of_axial(length: int) -> None:
    span, width = 8, 12
    n, m = divmod(length, span)
    cost = ready(heads=2, pattern="axial", span=span).cost(length)
    pairs = 2 * (n * span * (span + 1) // 2 + m * (m + 1) // 2 + span * n * (n - 1) // 2 + m * n)
    assert cost.pairs == pairs
    assert cost.parameters == (4 + 2) * DIM * 2 * width + DIM
    made = 2 * n * span * span
    keys = 4 * length * DIM * 2 * width if n else 0
    assert cost.flops == 2 * length * 4 * DIM * 2 * width + 4 * width * (pairs + made) + keys
    assert cost.state_bytes == (n * span * 2 * 2 * width + m * (3 * 2 * width + DIM)) * 8


def test_the_pattern_lists_tokens_and_then_abstractions() -> None:
    life = ready(heads=2, span=4).pattern(11)
    assert life.birth[0].tolist() == [*range(11), 4, 8]
    assert life.death[0].tolist() == [4] * 4 + [8] * 4 + [12] * 3 + [FOREVER] * 2
    assert life.generation[0].tolist() == [0] * 11 + [1] * 2
    life = ready(heads=2, pattern="logsparse").pattern(6)
    assert life.birth[0].tolist() == [*range(6), 1, 3, 5, 2, 6, 4]
    assert life.death[0].tolist() == [*range(1, 7), 2, 4, 6, 4, 8, 8]
    assert not hasattr(ready(heads=2, pattern="axial"), "pattern")


@pytest.mark.parametrize("settings", [PATTERNS["fixed"], PATTERNS["logsparse"]], ids=["fixed", "logsparse"])
def test_documents_need_no_more_abstractions(settings: dict[str, Any]) -> None:
    """As many slots however the row is packed, so that shapes do not depend on data."""
    mixer = ready(heads=2, **settings)
    assert isinstance(mixer, SpanCombiner)
    shapes = set()
    for lengths in ([40], [4] * 10, [7, 9, 1, 23], [1] * 40):
        packing = Packing([lengths])
        ctx = Context(positions=packing.positions, document_ends=packing.document_ends)
        plan = mixer.plan(read_clock(normal(1, 40, DIM), ctx, None), 0, None)
        alive = plan.spans.death > plan.spans.birth
        shapes.add(plan.spans.birth.shape)
        if settings["pattern"] == "fixed":
            assert int(alive.sum()) == sum((n - 1) // 4 for n in lengths[:-1]) + lengths[-1] // 4
    assert len(shapes) == 1


def test_packed_documents_cost_what_their_slots_cost() -> None:
    """Padding is bounded: fixed makes T // s abstractions, whichever are alive."""
    mixer, packing = ready(heads=2, span=4), Packing([[3, 9, 1, 20, 7]])
    x = normal(1, 40, DIM)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(x, Context(positions=packing.positions, document_ends=packing.document_ends))
    assert counter.get_total_flops() <= mixer.cost(40).flops


# States


@pytest.mark.parametrize("limit", [None, 1, 3, 4, 6, 9, 16])
@of_each_pattern
@torch.no_grad()
def test_it_does_not_matter_how_tokens_come(settings: dict[str, Any], limit: int | None) -> None:
    mixer = ready(heads=2, span_bias=True, **settings)
    tokens = Tokens.random(2, 60, DIM)
    positions = Packing([[60], [25, 35]]).positions
    outputs = []
    for chunks in ([1] * 60, [7, 1, 1, 20, 2, 29], [60]):
        state, start, parts = mixer.init_state(2, limit), 0, []
        for chunk in chunks:
            part = slice(start, start + chunk)
            parts.append(mixer(tokens.x[:, part], Context(positions=positions[:, part]), state).y)
            start += chunk
        outputs.append(torch.cat(parts, 1))
    assert all(largest_difference(other, outputs[0]) < 1e-12 for other in outputs[1:])


@pytest.mark.parametrize("limit", [1, 3, 4, 9, 20])
@of_each_pattern
@torch.no_grad()
def test_what_lives_under_a_limit(settings: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and abstractions, `limit` steps from their birth on; dyadic spans of the largest power of two within it.

    The axial abstraction in column c of a row counts from its token, and was made by the end of its row.
    """
    oracle, all_spans, all_direct = load("combiner"), load("combiner").spans, load("combiner").direct

    def spans(config: Any, i: int) -> list[list[int]]:
        found = all_spans(config, i)
        if config.pattern == "axial":
            return [span for span in found if i - span[i % config.span] < limit]
        longest = max(n for n in (1, 2, 4, 8, 16) if n <= limit) if config.pattern == "logsparse" else config.span
        return [span[-longest:] for span in found if i < span[-1] + 1 + limit]

    def direct(config: Any, i: int) -> list[int]:
        return [j for j in all_direct(config, i) if i < j + limit]

    monkeypatch.setattr(oracle, "spans", spans)
    monkeypatch.setattr(oracle, "direct", direct)
    mixer = ready(heads=2, **settings)
    x = normal(2, 45, DIM)
    expected = oracle.definition(mixer, x, Context())
    for chunks in ([45], [1] * 45):
        state = mixer.init_state(2, limit)
        y = torch.cat([mixer(part, None, state).y for part in x.split(chunks, 1)], 1)
        assert largest_difference(y, expected) < 1e-12


@pytest.mark.parametrize("limit", [1, 4, 9])
@of_each_pattern
@torch.no_grad()
def test_under_a_limit_nothing_old_is_known(settings: dict[str, Any], limit: int) -> None:
    """A key is made of at most max(limit, s) tokens and then lives for as many."""
    mixer = ready(heads=2, **settings)
    tokens, other = (Tokens.random(1, 80, DIM, seed=seed) for seed in (1, 2))
    reach = 2 * max(limit, 4)
    changed = other.then(tokens, 80 - reach)
    outputs = []
    for given in (tokens, changed):
        state = mixer.init_state(1, limit)
        outputs.append(torch.cat([given.part(t, t + 1).run(mixer, state) for t in range(80)], 1)[:, -1])
    assert largest_difference(*outputs) == 0


@of_each_pattern
@torch.no_grad()
def test_a_new_document_empties_the_state(settings: dict[str, Any]) -> None:
    mixer = ready(heads=2, **settings)
    x = normal(1, 46, DIM)
    state = mixer.init_state(1)
    mixer(x[:, :21], None, state)
    assert state.bytes == mixer.cost(21).state_bytes
    for length in range(1, 15):
        positions = torch.tensor([[length - 1]])
        y = mixer(x[:, 20 + length : 21 + length], Context(positions=positions), state).y
        assert state.bytes == mixer.cost(length).state_bytes
        assert largest_difference(y[:, -1], mixer(x[:, 21 : 21 + length]).y[:, -1]) < 1e-12


@of_each_pattern
@torch.no_grad()
def test_a_stream_is_held_in_bounded_memory(settings: dict[str, Any]) -> None:
    mixer = ready(heads=2, **settings)
    state = mixer.init_state(1, 16)
    x = normal(1, 8, DIM)
    capacity = []
    for _ in range(100):
        mixer(x, None, state)
        capacity.append(state.capacity)
    assert max(capacity[50:]) <= max(capacity[:50])


@torch.no_grad()
def test_a_row_that_began_before_the_stream_has_no_abstraction() -> None:
    """Only complete blocks: of a document first seen at position 6, the block of 4..7 is never complete."""
    x = normal(1, 10, DIM)
    positions = torch.arange(6, 16)[None]
    for settings in PATTERNS.values():
        mixer = ready(heads=2, **settings)
        y = mixer(x, Context(positions=positions)).y
        state = mixer.init_state(1)
        parts = [mixer(x[:, t : t + 1], Context(positions=positions[:, t : t + 1]), state).y for t in range(10)]
        assert largest_difference(torch.cat(parts, 1), y) < 1e-12
        changed = torch.cat([normal(1, 2, DIM, seed=5), x[:, 2:]], 1)
        moved = (mixer(changed, Context(positions=positions)).y - y).abs().amax((0, 2)) > 0
        assert moved[:2].all()
        assert not moved[2:].any() or settings["pattern"] == "logsparse"


# Settings and weights


def test_axial_shares_no_key_heads() -> None:
    problems = read_settings("combiner", 24, {"heads": 4, "kv_heads": 2, "pattern": "axial"})[1]
    assert problems == [("kv_heads", "kv_heads 2 must equal heads 4 while pattern is axial")]
    assert read_settings("combiner", 24, {"heads": 4, "kv_heads": 4, "pattern": "axial"})[1] == []
    assert read_settings("combiner", 24, {"heads": 4, "kv_heads": 2, "pattern": "fixed"})[1] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "strided"}, "pattern must be fixed or logsparse or axial, got 'strided'"),
        ({"span": 0}, "span must be >= 1, got 0"),
        ({"span": 2.5}, "span must be a whole number, got 2.5"),
        ({"span_bias": 1}, "span_bias must be true or false, got 1"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], message: str) -> None:
    assert [text for _, text in read_settings("combiner", 24, settings)[1]] == [message]


def test_matrices_of_axial_start_at_unit_gain() -> None:
    torch.manual_seed(0)
    mixer = build("combiner", 256, heads=4, head_dim=96, pattern="axial")
    for name, fan_in in (("row_output", 384), ("row_key", 256)):
        assert float(mixer.get_parameter(f"{name}.weight").detach().std()) == pytest.approx(fan_in**-0.5, rel=0.02)
    assert bool((mixer.get_parameter("row_norm.weight") == 1).all())
    tagged = [name for name, p in mixer.named_parameters() if getattr(p, "residual_output", False)]
    assert tagged == ["output.weight"]


def test_spans_of_the_square_root_cost_least() -> None:
    """Pairs of fixed: s T / 2 + T^2 / 2 s."""
    pairs = {span: ready(heads=2, span=span).cost(1024).pairs for span in (8, 16, 32, 64, 128)}
    assert min(pairs, key=pairs.__getitem__) == int(math.sqrt(1024))
