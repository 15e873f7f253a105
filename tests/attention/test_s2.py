"""S2-Attention: its printed pattern, its limits, and what other implementations got wrong.

Every sequence here is longer than its window: up to there a wrong shard shows nowhere.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.lifetimes import FOREVER
from attention.mixer import Context, Mixer, build, read_settings
from tests.conformance.oracle import load, multi_head_attention

ORACLE = load("s2")


def ready(dim: int = 16, **settings: Any) -> Mixer:
    """In float64, always from the same seed."""
    torch.manual_seed(0)
    return build("s2", dim, **settings).double()


def tokens(length: int) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def last_row(mixer: Mixer, length: int) -> list[str]:
    """For each key head the blocks that the last query meets, as ones and zeros."""
    life, block = mixer.pattern(length), mixer.config.block
    alive = (life.death >= length).expand(mixer.kv_heads, length).view(mixer.kv_heads, -1, block)
    assert torch.equal(alive.any(-1), alive.all(-1))
    return ["".join(str(int(b)) for b in row) for row in alive.all(-1)]


# The pattern


def test_the_printed_rows() -> None:
    """Block 16, 128 tokens, 2 local blocks, stride 4, 4 key heads: the last block's row of each head."""
    mixer = ready(heads=4, block=16, local_blocks=2, stride=4)
    assert last_row(mixer, 128) == ["10001011", "00010011", "00100011", "01000111"]


def test_the_shards_of_all_heads_hold_every_block() -> None:
    mixer = ready(dim=32, heads=8, block=4, local_blocks=1)
    never = mixer.pattern(128).death == FOREVER
    assert torch.equal(never.sum(0), torch.ones(128, dtype=torch.int64))


def test_steps_are_counted_in_key_heads() -> None:
    """Counted in query heads the two shards would be neighbours, blocks 0 and 3 of every 4."""
    with pytest.warns(UserWarning, match="cannot be seen"):
        mixer = ready(heads=8, kv_heads=2, head_dim=2, block=4, local_blocks=1, stride=4)
    assert last_row(mixer, 32) == ["10001001", "00100011"]


def test_dense_heads_are_the_last() -> None:
    mixer = ready(heads=4, block=4, local_blocks=1, stride=4, dense_heads=2)
    assert last_row(mixer, 32) == ["10001001", "00010001", "11111111", "11111111"]


def test_homogeneous_heads_have_the_shard_of_the_first() -> None:
    mixer = ready(heads=4, block=4, local_blocks=1, stride=4, homogeneous=True, offset=1)
    assert last_row(mixer, 32) == ["00010001"] * 4


@pytest.mark.parametrize("offset", [0, 1, 3, 4, 11])
def test_an_offset_moves_every_shard(offset: int) -> None:
    never = ready(heads=4, block=2, local_blocks=1, offset=offset).pattern(64).death == FOREVER
    for head in range(4):
        kept = [c for c in range(32) if (c + head + offset) % 4 == 0]
        assert never[head, ::2].nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("length", [256, 300])
@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 4, "block": 16, "local_blocks": 2, "stride": 4},
        {"heads": 4, "kv_heads": 2, "block": 5, "local_blocks": 3, "stride": 2, "offset": 1},
        {"heads": 4, "block": 8, "local_blocks": 1, "stride": 3, "dense_heads": 1},
        {"heads": 2, "block": 7, "local_blocks": 4, "homogeneous": True},
    ],
    ids=str,
)
def test_over_many_tiles_it_is_its_definition(settings: dict[str, Any], length: int) -> None:
    """Patterns of heads that are not nested in each other must not be merged in one tile."""
    mixer, x = ready(**settings), tokens(length).requires_grad_()
    assert length > mixer.config.block * mixer.config.local_blocks
    y, expected = mixer(x).y, ORACLE.definition(mixer, x, Context())
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_mixers_of_different_settings_do_not_share_a_pattern() -> None:
    """Layouts kept by length alone give the second layer the pattern of the first."""
    base = {"heads": 4, "block": 4, "local_blocks": 2}
    others = [{}, {"offset": 1}, {"stride": 2}, {"block": 5}, {"local_blocks": 1}, {"dense_heads": 1}]
    x, ctx = tokens(50), Context(positions=torch.arange(50).expand(2, 50))
    for given in (None, ctx):
        for mixer in [ready(**base | other) for other in others] * 2:
            expected = ORACLE.definition(mixer, x, Context())
            torch.testing.assert_close(mixer(x, given).y, expected, rtol=0, atol=1e-12)


# Limits


@pytest.mark.parametrize(
    "settings",
    [{"stride": 1}, {"dense_heads": 2}, {"local_blocks": 13}, {"block": 50, "local_blocks": 1}],
    ids=str,
)
def test_dense_limits(settings: dict[str, Any]) -> None:
    mixer, x = ready(**{"heads": 4, "kv_heads": 2, "block": 4, "local_blocks": 2} | settings), tokens(50)
    torch.testing.assert_close(mixer(x).y, multi_head_attention(mixer, x, Context()), rtol=0, atol=1e-12)


# Costs


@pytest.mark.parametrize("blocks", [5, 40, 128])
def test_pairs_and_rows_of_complete_blocks(blocks: int) -> None:
    """Counted in blocks: a head's own shard has every key met by all later queries, the rest for the window."""
    block, local, stride = 64, 4, 8
    cost = build("s2", 64, heads=8, block=block, local_blocks=local).cost(blocks * block)
    pairs = rows = 0
    for head in range(8):
        for c in range(blocks):
            shard = (c + head) % stride == 0
            later = blocks - 1 - c if shard else min(blocks - 1 - c, local - 1)
            pairs += block * (block + 1) // 2 + later * block * block
            rows += block * (shard or c > blocks - local)
    assert cost.pairs == pairs
    assert cost.state_bytes == rows * 2 * 8 * 4


def test_the_speed_it_can_have_over_dense() -> None:
    """Block 64, 16 local blocks, stride 8: 2.96 times at 8k tokens and 7.2 at 128k, where no window is cut short."""
    for length, bound in ((2**13, 2.96), (2**17, 7.2)):
        pairs = build("s2", 64, heads=8, block=64, local_blocks=16).cost(length).pairs / 8
        cut_short = 1024 * (1024 - 64) // 2
        assert length**2 / 2 / (pairs + cut_short) == pytest.approx(bound, rel=0.005)


# Settings


def test_blocks_that_nobody_sees_are_warned_of_once() -> None:
    with pytest.warns(UserWarning, match="s2") as told:
        build("s2", 16, heads=8, kv_heads=2, head_dim=2, block=4, local_blocks=3, stride=5)
    assert [str(w.message) for w in told] == [
        "s2: kv_heads 2 is less than stride 5 and dense_heads is 0: of every 5 blocks 3 cannot be seen beyond the "
        "window of 12 tokens in this layer"
    ]


@pytest.mark.parametrize("settings", [{}, {"stride": 4}, {"stride": 9, "dense_heads": 1}, {"homogeneous": True}])
def test_nothing_is_said_otherwise(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("s2", 32, heads=8, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"homogeneous": True, "dense_heads": 1},
            ("dense_heads", "dense_heads 1 must be 0 while homogeneous is true: all heads are alike"),
        ),
        ({"kv_heads": 2, "dense_heads": 3}, ("dense_heads", "dense_heads 3 exceeds kv_heads 2; nearest: 2")),
        ({"heads": 4, "dense_heads": 5}, ("dense_heads", "dense_heads 5 exceeds kv_heads 4; nearest: 4")),
        ({"local_blocks": 0}, ("local_blocks", "local_blocks must be >= 1, got 0")),
        ({"stride": 0}, ("stride", "stride must be >= 1, got 0")),
        ({"offset": -1}, ("offset", "offset must be >= 0, got -1")),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], expected: tuple[str, str]) -> None:
    assert read_settings("s2", 32, settings)[1] == [expected]
