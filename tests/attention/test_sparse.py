"""Sparse Transformer: what its pattern is, what it costs, and what other implementations got wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention import sparse
from attention.lifetimes import FOREVER
from attention.mixer import Context, Mixer, build, read_settings
from tests.conformance.oracle import load, masked_attention, multi_head_attention

ORACLE = load("sparse")
FIXED = {"heads": 4, "kv_heads": 2, "block": 12, "columns": 5}
STRIDED = {"pattern": "strided", "heads": 4, "kv_heads": 2, "block": 9}
BY_HEADS = {"arrangement": "heads"}
FOUR = {"fixed": FIXED, "strided": STRIDED, "fixed heads": FIXED | BY_HEADS, "strided heads": STRIDED | BY_HEADS}

of_all_four = pytest.mark.parametrize("settings", FOUR.values(), ids=FOUR.keys())


def ready(**settings: Any) -> Mixer:
    """In float64, always from the same seed; 16 wide."""
    torch.manual_seed(0)
    return build("sparse", 16, **settings).double()


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The pattern


@pytest.mark.parametrize("length", [36, 40, 47])
def test_every_block_has_exactly_its_columns(length: int) -> None:
    """The range that the paper prints would have one more."""
    mixer = ready(heads=3, block=12, columns=4, rotary=0, head_dim=2)
    never = mixer.pattern(length).death == FOREVER
    for head, columns in enumerate([range(8, 12), range(4, 8), range(0, 4)]):
        assert never[head].nonzero()[:, 0].tolist() == [t for t in range(length) if t % 12 in columns]


def test_heads_take_turns_until_the_columns_are_used_up() -> None:
    first = [(life == FOREVER).nonzero()[0].item() for life in ready(heads=4, block=12, columns=5).pattern(12).death]
    assert first == [7, 2, 7, 2]
    same = ready(heads=4, block=12, columns=5, distinct_columns=False).pattern(12)
    assert (same.death[..., :12] == FOREVER).nonzero()[:, -1].tolist() == [7, 8, 9, 10, 11]


def test_a_pattern_in_two_orders_has_no_lifetimes_in_one() -> None:
    assert hasattr(ready(**FIXED), "pattern")
    assert not hasattr(ready(**STRIDED), "pattern")


@of_all_four
def test_over_many_tiles_it_is_its_definition(settings: dict[str, Any]) -> None:
    mixer, x = ready(**settings), tokens(300).requires_grad_()
    y, expected = mixer(x).y, ORACLE.definition(mixer, x, Context())
    assert_close(y, expected)
    assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)), atol=1e-10)


def test_far_heads_meet_nobody_before_the_first_column() -> None:
    """There the head gives nothing: not the tokens themselves, and no NaN."""
    mixer = ready(heads=4, block=8, columns=2, **BY_HEADS)
    with torch.no_grad():
        mixer.output.weight[:, :8] = 0  # the near heads
        mixer.output.weight[:, 12:] = 0  # head 3; head 2 has turn 2 of 4, the columns 2 and 3
    x = tokens(20).requires_grad_()
    y = mixer(x).y
    assert not y[:, :2].any()
    assert y[:, 2:].detach().abs().amax(-1).gt(0).all()
    y.square().sum().backward()
    assert x.grad.isfinite().all()


def test_mixers_of_different_settings_do_not_share_a_pattern() -> None:
    """Layouts kept by length alone give the second layer the pattern of the first."""
    x, ctx = tokens(50), Context(positions=torch.arange(50).expand(2, 50))
    settings = [*FOUR.values(), FIXED | {"columns": 2}, FIXED | {"distinct_columns": False}, STRIDED | {"block": 4}]
    for given in (None, ctx):
        for mixer in [ready(**s) for s in settings] * 2:
            assert_close(mixer(x, given).y, ORACLE.definition(mixer, x, Context()))


def test_layers_that_are_alike_share_their_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = sparse.make_lanes
    monkeypatch.setattr(sparse, "make_lanes", lambda *args, **settings: made.append(1) or make(*args, **settings))
    ctx = Context(positions=torch.arange(31).expand(2, 31))
    for mixer in (ready(**STRIDED), ready(**STRIDED)):
        mixer(tokens(31), ctx)
    assert len(made) == 1


# Limits


@pytest.mark.parametrize(
    "settings",
    [
        {"block": 40},
        {"block": 64, "columns": 3},
        {"block": 12, "columns": 12},
        {"pattern": "strided", "block": 1},
        {"pattern": "strided", "block": 40},
        {"pattern": "strided", "block": 1, "arrangement": "heads", "near": False},
    ],
    ids=str,
)
def test_dense_limits(settings: dict[str, Any]) -> None:
    near = settings.pop("near", True)
    mixer, x = ready(heads=4, kv_heads=2, **settings), tokens(40)
    if not near:  # a window of one token is not dense, a lane of stride one is
        with torch.no_grad():
            mixer.output.weight[:, :8] = 0
    assert_close(mixer(x).y, multi_head_attention(mixer, x, Context()))


def test_a_window_of_one_token_in_near_heads() -> None:
    mixer, x = ready(pattern="strided", heads=4, block=1, **BY_HEADS), tokens(20)
    with torch.no_grad():
        mixer.output.weight[:, 8:] = 0
    values = torch.nn.functional.linear(x, mixer.qkv.weight[32:])
    assert_close(mixer(x).y, torch.nn.functional.linear(values, mixer.output.weight))


# Costs


def triangle(n: int) -> int:
    return n * (n + 1) // 2


@pytest.mark.parametrize("length", [1, 100, 128, 1000, 8192])
def test_pairs_of_the_fixed_pattern(length: int) -> None:
    block, columns = 128, 32
    n, m = divmod(length, block)
    per_head = n * triangle(block) + triangle(m) + columns * (block * n * (n - 1) // 2 + m * n)
    assert ready(heads=4).cost(length).pairs == 4 * per_head


@pytest.mark.parametrize("length", [1, 100, 128, 1000, 8192])
def test_pairs_of_the_strided_pattern(length: int) -> None:
    stride = 128
    lanes = [len(range(first, length, stride)) for first in range(min(stride, length))]
    window = sum(min(i + 1, stride) for i in range(length))
    merged, halved = (ready(pattern="strided", heads=4, arrangement=a).cost(length) for a in ("merged", "heads"))
    assert merged.pairs == 4 * (window + sum(a * (a - 1) // 2 for a in lanes))
    assert halved.pairs == 2 * (window + sum(map(triangle, lanes)))


def test_rows_of_the_state() -> None:
    per_row = 2 * 4 * 4  # k and v of four float32
    heads, length = 4, 12288

    def rows(**settings: Any) -> int:
        return build("sparse", 16, heads=heads, **settings).cost(length).state_bytes // per_row

    assert rows() == heads * 3072  # the paper's own setting: 96 blocks of 128, 32 columns
    assert rows(pattern="strided") == heads * length
    assert rows(pattern="strided", **BY_HEADS) == 2 * length + 2 * 127
    assert rows(**BY_HEADS) == 2 * 3072  # near heads: the last block is complete and gone


def test_at_the_length_of_the_design_it_is_4_times_below_dense() -> None:
    dense, fixed = build("dense", 16, heads=4).cost(8192).pairs, build("sparse", 16, heads=4).cost(8192).pairs
    assert 3.8 < dense / fixed < 3.9


# Streams


@of_all_four
@pytest.mark.parametrize("chunks", [[1] * 60, [7, 1, 30, 22], [60]], ids=["by token", "ragged", "at once"])
def test_a_limit_cuts_exactly(settings: dict[str, Any], chunks: list[int]) -> None:
    """Whatever the chunks, a query meets its keys of the last `limit` tokens."""
    mixer, x = ready(**settings), tokens(60)
    age = torch.arange(60)[:, None] - torch.arange(60)
    expected = masked_attention(mixer, x, ORACLE.mask(mixer.config, 60) & (age < 20))
    state = mixer.init_state(2, limit=20)
    y = torch.cat([mixer(part, None, state).y for part in x.split(chunks, 1)], 1)
    assert_close(y, expected)


@of_all_four
def test_rows_of_a_stream_start_their_documents_apart(settings: dict[str, Any]) -> None:
    """Grids go on with each row's own document, long after rows were forgotten."""
    mixer, x = ready(**settings).eval(), tokens(200)
    starts = torch.tensor([[0, 70, 151], [0, 13, 113]])
    time = torch.arange(200)
    positions = time - torch.where(starts[:, :, None] <= time, starts[:, :, None], 0).amax(1)
    state = mixer.init_state(2)
    with torch.no_grad():
        parts = zip(x.split([1] * 90 + [60, 50], 1), positions.split([1] * 90 + [60, 50], 1), strict=True)
        y = torch.cat([mixer(part, Context(positions=p), state).y for part, p in parts], 1)
        for row, cuts in enumerate(starts.tolist()):
            for start, stop in zip(cuts, [*cuts[1:], 200], strict=True):
                alone = ORACLE.definition(mixer, x[row : row + 1, start:stop], Context())
                assert_close(y[row : row + 1, start:stop], alone)


# Settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"columns": 9, "block": 8}, ("columns", "columns 9 exceeds block 8; nearest: columns 8")),
        (
            {"heads": 3, "head_dim": 2, "arrangement": "heads"},
            ("heads", "heads 3 must be even while arrangement is heads; nearest: heads 2, heads 4, arrangement merged"),
        ),
        (
            {"heads": 12, "kv_heads": 3, "head_dim": 2, "arrangement": "heads"},
            (
                "kv_heads",
                "kv_heads 3 must be even while arrangement is heads; "
                "nearest: kv_heads 2, kv_heads 4, arrangement merged",
            ),
        ),
        (
            {"heads": 9, "kv_heads": 3, "head_dim": 2, "arrangement": "heads"},
            ("kv_heads", "kv_heads 3 must be even while arrangement is heads; nearest: arrangement merged"),
        ),
        ({"columns": 0}, ("columns", "columns must be >= 1, got 0")),
        ({"pattern": "axial"}, ("pattern", "pattern must be fixed or strided, got 'axial'")),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], expected: tuple[str, str]) -> None:
    assert read_settings("sparse", 16, settings)[1] == [expected]


def test_columns_do_not_bind_a_stride() -> None:
    assert read_settings("sparse", 16, {"pattern": "strided", "block": 8, "columns": 9})[1] == []
