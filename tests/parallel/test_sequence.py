"""The one collective of ranks that share a sequence: what crosses, its way back, and its bytes."""

from typing import Any

import pytest
import torch

from attention.mixer import Context, build
from attention.shard import gather_tokens, mean_of_ranks, to_higher
from parallel.sequence import SequenceShard, even_lengths
from parallel.world import ALONE, World
from tests.processes import run_ranks


def _exchange(world: World, dtype: torch.dtype) -> Any:
    """Rank r has the rows 10 r, 10 r + 1, 10 r + 2, and sends to rank s the rows up to s."""
    shard = SequenceShard(world, [3] * world.size)
    rows = (10.0 * world.rank + torch.arange(3.0)).repeat(2, 1).T.to(dtype).requires_grad_()
    got = shard.exchange(rows, [torch.arange(other + 1) for other in range(3)], [world.rank + 1] * 3)
    # One after another in bfloat16 the gradients of row 0, 256, 0.75 and 0.75, would sum up to 256.
    got.backward(torch.full_like(got, 0.75 if world.rank else 256.0))
    assert rows.grad is not None
    assert got.dtype == rows.grad.dtype == dtype
    return got[:, 0].tolist(), rows.grad[:, 0].tolist(), shard.sent, shard.received


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_cross_and_gradients_come_back_summed(dtype: torch.dtype) -> None:
    results = run_ranks(3, _exchange, dtype, sequence=3)
    assert [got for got, *_ in results] == [[0, 10, 20], [0, 1, 10, 11, 20, 21], [0, 1, 2, 10, 11, 12, 20, 21, 22]]
    summed = float(torch.tensor(257.5).to(dtype))
    assert [grad for _, grad, *_ in results] == [[summed, 1.5, 0.75]] * 3
    row = 2 * dtype.itemsize
    # Rank 0 sends 2 + 3 rows, rank 1 sends 1 + 3, rank 2 sends 1 + 2; what stays does not count. Gradients go back.
    there, here = [5, 4, 3], [2, 4, 6]
    both = [(a + b) * row for a, b in zip(there, here, strict=True)]
    assert [sent for *_, sent, _ in results] == [received for *_, received in results] == both


def _helpers(world: World) -> Any:
    shard = SequenceShard(world, [2, 1, 3])
    own = torch.arange(6)[shard.tokens].expand(2, -1).to(torch.int32)
    whole = gather_tokens(shard, own, 1)
    parts = [torch.full((2, 2), 10.0 * world.rank + other) for other in range(world.rank + 1, 3)]
    came = to_higher(shard, parts or [torch.zeros(2, 2)])
    mean = mean_of_ranks(shard, own.double().mean(1))
    return whole.tolist(), [part.unique().tolist() for part in came], mean.tolist()


def test_what_mixers_ask_for() -> None:
    results = run_ranks(3, _helpers, sequence=3)
    assert [whole for whole, *_ in results] == [[[0, 1, 2, 3, 4, 5]] * 2] * 3
    assert [came for _, came, _ in results] == [[], [[1.0]], [[2.0], [12.0]]]
    assert [mean for *_, mean in results] == [[2.5, 2.5]] * 3


def _bytes(world: World, kind: str, settings: dict[str, Any]) -> list[int]:
    shard = SequenceShard(world, even_lengths(96, world.size))
    mixer = build(kind, 16, **settings)
    mixer(torch.randn(2, 96, 16)[:, shard.tokens], Context(shard=shard))
    return [shard.sent, shard.received]


@pytest.mark.parametrize(
    ("kind", "settings", "rows"),
    [
        ("dense", {"heads": 2}, [[2 * 32, 32, 0], [0, 32, 2 * 32]]),
        ("local", {"heads": 2, "window": 8}, [[7, 7, 0], [0, 7, 7]]),
        ("local", {"heads": 2, "window": 40}, [[32 + 7, 32, 0], [0, 32, 32 + 7]]),
        ("s2", {"heads": 2, "block": 4, "local_blocks": 1, "stride": 4}, [[16, 8, 0], [0, 8, 16]]),
    ],
)
def test_only_keys_that_outlive_their_shard_travel(kind: str, settings: dict[str, Any], rows: list[list[int]]) -> None:
    """So many rows of key and value, 8 numbers each, of 2 key heads in 2 sequences, are sent and received."""
    found = run_ranks(3, _bytes, kind, settings, sequence=3)
    unit = 2 * 2 * 2 * 8 * 4
    assert found == [[sent * unit, received * unit] for sent, received in zip(*rows, strict=True)]


def test_even_lengths() -> None:
    assert even_lengths(10, 4) == [3, 3, 2, 2]
    assert even_lengths(8, 1) == [8]


def test_lengths_that_do_not_fit() -> None:
    for lengths in ([], [2, 3], [0]):
        with pytest.raises(ValueError, match=r"parallel\.sequence: 1 ranks share a row"):
            SequenceShard(ALONE, lengths)
    assert SequenceShard(ALONE, [5]).tokens == slice(0, 5)
