"""Ranks that trade tokens for heads: who takes which, and that nothing changes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attention.heads import HeadShare
from attention.mixer import Context, build
from attention.softmax import TokenAttention
from parallel.sequence import SequenceShard, even_lengths
from parallel.world import ALONE, World
from tests.conformance.oracle import Case, Subject
from tests.conformance.test_shards import CUT_AT_A_SHARD, LENGTHS, ROWS, Result, Setting, differences, run
from tests.processes import run_ranks

SUBJECTS = [
    Subject("dense", Case({"heads": 6, "kv_heads": 2}, dim=12)),
    Subject("dense", Case({"heads": 5, "head_dim": 4}, dim=7)),
    Subject("dense", Case({"heads": 4, "kv_heads": 1}, dim=8)),
    Subject("inattention", Case({"heads": 6, "kv_heads": 2}, dim=12)),
    Subject("local", Case({"heads": 6, "kv_heads": 3, "window": 8}, dim=12)),
    Subject("s2", Case({"heads": 6, "kv_heads": 3, "block": 4, "local_blocks": 2}, dim=12)),
    Subject("sparse", Case({"heads": 10, "kv_heads": 5, "block": 6, "columns": 2}, dim=20)),
]
SETTINGS = [Setting(s, *told) for s in SUBJECTS for told in ((ROWS, ()), (CUT_AT_A_SHARD, ("positions",)))]


def _always_trade(world: World) -> list[Result]:
    TokenAttention.trades_heads = lambda *_: True  # type: ignore[method-assign]
    return [run(setting, world, SequenceShard(world, LENGTHS[world.size])) for setting in SETTINGS]


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_traded_for_tokens_change_nothing(ranks: int) -> None:
    results = run_ranks(ranks, _always_trade, sequence=ranks)
    for setting, *parts in zip(SETTINGS, *results, strict=True):
        worst = max(differences(parts, run(setting, ALONE, None)).items(), key=lambda item: item[1])
        assert worst[1] < 1e-10, (setting, worst)


def test_shares_are_even_and_keep_key_heads_with_their_queries() -> None:
    share = HeadShare(4, 6, 2)
    assert [list(share.queries(rank)) for rank in range(4)] == [[0], [1, 2], [3], [4, 5]]
    assert [list(share.keys(rank)) for rank in range(4)] == [[0], [0], [1], [1]]
    share = HeadShare(2, 6, 3)
    assert [list(share.keys(rank)) for rank in range(2)] == [[0, 1], [1, 2]]
    assert [share.local(rank) for rank in range(2)] == [[0, 0, 1], [0, 1, 1]]


def _sent(world: World, heads: int, kv_heads: int, window: int | None) -> int:
    shard = SequenceShard(world, even_lengths(64, world.size))
    kind, settings = ("dense", {}) if window is None else ("local", {"window": window})
    mixer = build(kind, 16, heads=heads, kv_heads=kv_heads, head_dim=8, **settings)
    mixer(torch.randn(2, 64, 16)[:, shard.tokens], Context(shard=shard))
    return shard.sent // (2 * 8 * 4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "vectors"),
    [
        (4, 4, None, [32 * (2 + 4) + 32 * 2] * 2),  # q, k and v of 2 heads there, their outputs back
        (4, 1, None, [32 * (2 + 2) + 32 * 2] * 2),  # also if one key head would be less: the work is shared
        (4, 4, 8, [7 * 4 * 2, 0]),  # a window is less
        (4, 4, 64, [32 * (2 + 4) + 32 * 2] * 2),  # a wide one is not
        (4, 1, 64, [32 * 2, 0]),
        (1, 1, None, [32 * 2, 0]),  # a head cannot be shared
    ],
)
def test_what_moves(heads: int, kv_heads: int, window: int | None, vectors: list[int]) -> None:
    assert run_ranks(2, _sent, heads, kv_heads, window, sequence=2) == vectors


def _work(world: World, kv_heads: int) -> int:
    shard = SequenceShard(world, even_lengths(64, world.size))
    mixer = build("dense", 16, heads=4, kv_heads=kv_heads)
    with FlopCounterMode(display=False) as counter:
        mixer(torch.randn(2, 64, 16)[:, shard.tokens], Context(shard=shard))
    return counter.get_total_flops()


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_dense_attention_is_as_much_work_on_every_rank(kv_heads: int) -> None:
    one, *others = run_ranks(4, _work, kv_heads, sequence=4)
    assert others == [one] * 3
    assert 4 * one == build("dense", 16, heads=4, kv_heads=kv_heads).cost(64).flops * 2
