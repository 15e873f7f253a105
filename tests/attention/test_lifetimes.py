"""Lifetimes: the mask they mean, the query intervals they become, the pairs they cost."""

import pytest
import torch

from attention.lifetimes import FOREVER, Lifetimes, causal, living_pairs, query_intervals, window


def random_lives(batch, heads, keys, queries):
    birth = torch.randint(-5, queries + 5, (batch, heads, keys), dtype=torch.int32)
    death = birth + torch.randint(-2, queries, birth.shape, dtype=torch.int32)
    birth[..., ::7] = FOREVER
    death[..., ::5] = FOREVER
    return Lifetimes(birth, death)


def test_forever_is_the_largest_time():
    assert torch.iinfo(torch.int32).max == FOREVER


@pytest.mark.parametrize(
    ("birth", "death", "generation", "message"),
    [
        (torch.arange(3), torch.arange(3).int(), None, "birth: expected an int32 tensor.*int64"),
        (torch.arange(3).int(), [1, 2, 3], None, "death: expected an int32 tensor.*list"),
        (torch.arange(3).int(), torch.arange(3).int(), torch.zeros(3), "generation: .*float32"),
    ],
)
def test_lifetimes_are_int32_tensors(birth, death, generation, message):
    with pytest.raises(ValueError, match=message):
        Lifetimes(birth, death, generation)


def test_alive():
    life = Lifetimes(torch.tensor([0, 2, 3]).int(), torch.tensor([2, FOREVER, 3]).int())
    met = life.alive(torch.tensor([0, 1, 2, FOREVER]))
    assert met.tolist() == [[True, False, False], [True, False, False], [False, True, False], [False] * 3]


def test_window_and_causal_masks():
    ones = torch.ones(9, 9, dtype=torch.bool)
    now = torch.arange(9)
    assert torch.equal(causal(9).alive(now), ones.tril())
    assert torch.equal(window(9, 3).alive(now), ones.tril() & ones.triu(-2))
    assert torch.equal(window(9, FOREVER).alive(now), ones.tril())


def test_until_takes_the_earlier_end():
    ends = torch.tensor([[3, 3, 3, 6, 6, 6]], dtype=torch.int32)
    life = window(6, 2).until(ends)
    assert life.death.tolist() == [[2, 3, 3, 5, 6, 6]]
    assert life.birth.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("time_shape", [None, (1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("life_shape", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_intervals_and_pairs_are_those_of_the_mask(life_shape, time_shape):
    torch.manual_seed(0)
    queries, keys = 20, 30
    life = random_lives(*life_shape, keys, queries)
    time = None
    if time_shape is not None:
        time = torch.randint(0, 30, (*time_shape, queries), dtype=torch.int32).sort(-1).values
        time[..., -3:] = FOREVER
    sizes = {"heads": 4, "kv_heads": 2, "num_queries": queries, "num_keys": keys}
    start, stop = query_intervals(life, time, **sizes)
    number = torch.arange(queries)[:, None]
    by_interval = (start[..., None, :] <= number) & (number < stop[..., None, :])
    now = torch.arange(queries) if time is None else time
    lives = [x.expand(2, 2, keys).repeat_interleave(2, 1) for x in (life.birth, life.death)]
    by_mask = Lifetimes(*lives).alive(now.expand(2, 4, queries))
    assert torch.equal(by_interval.expand(2, 2, 2, queries, keys).flatten(1, 2), by_mask)
    assert living_pairs(life, time, batch=2, **sizes) == int(by_mask.sum())


def test_repeated_lists_are_found_alike():
    life = Lifetimes(*(x.expand(3, 2, 50) for x in (causal(50).birth, causal(50).death)))
    time = torch.arange(50, dtype=torch.int32).expand(3, 4, 50)
    start, _ = query_intervals(life, time, heads=4, kv_heads=2, num_queries=50, num_keys=50)
    assert start.numel() == 50


def test_pairs_of_a_window_at_a_length_whose_mask_would_not_fit():
    length, width = 2**20, 1000
    pairs = living_pairs(window(length, width), batch=3, heads=4, kv_heads=2, num_queries=length, num_keys=length)
    assert pairs == 3 * 4 * (length * width - width * (width - 1) // 2)
