"""The decode cache holds every key that a later query may meet, and little else."""

import pytest
import torch
from torch import Tensor

from attention.cache import LivingKeys
from attention.clock import Clock, read_clock
from attention.lifetimes import FOREVER, Lifetimes
from attention.mixer import Context, build

CPU = torch.device("cpu")


def rows(start: int, stop: int, batch: int = 1, heads: int = 1) -> Tensor:
    """Keys that carry their own birth: [B, G, n, 1]."""
    return torch.arange(start, stop, dtype=torch.float32)[:, None].expand(batch, heads, -1, 1)


def add(cache: LivingKeys, death: Tensor, ctx: Context | None = None) -> tuple[Tensor, Lifetimes]:
    """Keys born one by one that die as `death` [B, G, n] says; what the queries are given."""
    batch, heads, new = death.shape
    now = cache.stream.now
    clock = read_clock(torch.zeros(batch, new), ctx, cache.stream)
    birth = clock.time[:, None].to(torch.int32)
    k = rows(now, now + new, batch, heads)
    keys, _, life = cache.extend(k, k, Lifetimes(birth, clock.until(death)), clock)
    life = Lifetimes(life.birth.clone(), life.death.clone())
    keys = keys.clone()
    cache.advance(clock)
    return keys, life


def living(keys: Tensor, life: Lifetimes, time: int) -> list[list[set[int]]]:
    """Births of the keys that a query at `time` meets, for each row and head."""
    batch, heads, number = keys.shape[:3]
    birth, death = (t.expand(batch, heads, number) for t in (life.birth, life.death))
    meets = (birth <= time) & (time < death)
    return [[set(keys[b, g, meets[b, g], 0].int().tolist()) for g in range(heads)] for b in range(batch)]


def test_every_living_key_is_there_and_the_dead_are_forgotten() -> None:
    """Random lifespans, two rows, three heads that own different numbers of living keys."""
    generator = torch.Generator().manual_seed(0)
    cache = LivingKeys(2, CPU)
    span = torch.randint(1, 30, (2, 3, 500), generator=generator)
    span[:, 0] //= 8  # some are dead when they are born
    death = torch.arange(500) + span
    now = 0
    for new in [1] * 150 + [37, 3, 90, 1, 1, 118, 100]:
        keys, life = add(cache, death[:, :, now : now + new])
        for time in (now, now + new - 1):
            expected = [[{j for j in range(time + 1) if death[b, g, j] > time} for g in range(3)] for b in range(2)]
            assert living(keys, life, time) == expected
        now += new
        alive = int((death[:, :, :now] > now).sum())
        assert cache.bytes == alive * 2 * 4
        assert cache.bytes <= cache.capacity
    assert cache.size < 300


def test_memory_stays_bounded() -> None:
    cache = LivingKeys(1, CPU)
    for time in range(1000):
        add(cache, torch.tensor([[[time + 8]]]))
    assert cache.bytes == 7 * 2 * 4
    assert cache.capacity <= 128 * 2 * 4


def test_an_ended_document_is_forgotten() -> None:
    """A position 0 ends what was before it, in its row alone."""
    cache = LivingKeys(2, CPU)
    for_ever = torch.full((1, 1, 1), FOREVER)
    add(cache, for_ever.expand(2, 1, 70))
    positions = torch.tensor([[70, 71, 72], [70, 0, 1]])
    keys, life = add(cache, for_ever.expand(2, 1, 3), Context(positions=positions))
    assert living(keys, life, 70) == [[set(range(71))]] * 2
    assert living(keys, life, 72) == [[set(range(73))], [{71, 72}]]
    assert cache.bytes == (73 + 2) * 2 * 4
    keys, life = add(cache, for_ever.expand(2, 1, 1))
    assert living(keys, life, 73) == [[set(range(74))], [{71, 72, 73}]]


def test_all_may_be_dead() -> None:
    cache = LivingKeys(1, CPU)
    add(cache, torch.arange(70)[None, None] + 1)
    assert (cache.size, cache.bytes) == (0, 0)
    keys, life = add(cache, torch.tensor([[[71 + 5]]]))
    assert living(keys, life, 70) == [[{70}]]


def test_an_empty_cache_holds_nothing() -> None:
    cache = LivingKeys(3, CPU)
    assert (cache.bytes, cache.capacity) == (0, 0)


@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 13]])
def test_a_limit_makes_dense_a_window(chunks: list[int]) -> None:
    """No key outlives `limit` tokens: full attention with a limit is the window of that width."""
    torch.manual_seed(0)
    dense = build("dense", 8, heads=2).double()
    window = build("local", 8, heads=2, window=6).double()
    window.load_state_dict(dense.state_dict())
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    state = dense.init_state(2, limit=6)
    y = torch.cat([dense(part, None, state).y for part in x.split(chunks, 1)], 1)
    torch.testing.assert_close(y, window(x).y, rtol=0, atol=1e-14)


def test_what_is_stored_holds_no_graph() -> None:
    cache = LivingKeys(1, CPU)
    clock = Clock.plain(4)
    k = rows(0, 4).clone().requires_grad_()
    cache.extend(k * 2, k * 3, Lifetimes(clock.time[:, None].int(), clock.until(clock.time[:, None] + 9)), clock)
    assert not any(tensor.requires_grad for tensor in cache.rows.values())


def test_later_tokens_leave_alone_what_backward_will_read() -> None:
    """With gradients, keys handed out are copies: the next tokens end documents in place."""
    torch.manual_seed(0)
    mixer = build("dense", 8, heads=2).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    positions = torch.arange(12).expand(2, 12).clone()
    positions[:, 9:] -= 9

    def gradient(*, more: bool) -> Tensor:
        state = mixer.init_state(2)
        mixer(x[:, :4], None, state)
        leaf = x[:, 4:9].clone().requires_grad_()
        y = mixer(leaf, None, state).y
        if more:
            mixer(x[:, 9:], Context(positions=positions[:, 9:]), state)
        y.square().sum().backward()
        return leaf.grad

    assert torch.equal(gradient(more=True), gradient(more=False))
