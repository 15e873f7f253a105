"""What is learnt online: when it is written, how it moves, what it is made of."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention.online import OnlineMeans

HEADS, ENTRIES, DIM = 2, 3, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Learner(nn.Module):
    """y = x w, and every vector of x is assigned to the entry it is given."""

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.online = OnlineMeans(drawn(HEADS, ENTRIES, DIM), decay)

    def forward(self, x: Tensor, entry: Tensor) -> Tensor:
        return self.online.learn(x * self.weight, x, entry)


def batch(seed: int = 1, length: int = 20) -> tuple[Tensor, Tensor]:
    """x [2, H, T, D] and entries; nothing is assigned to the last entry of head 1."""
    generator = torch.Generator().manual_seed(seed)
    entry = torch.randint(ENTRIES, (2, HEADS, length), generator=generator)
    entry[:, 1] %= ENTRIES - 1
    return drawn(2, HEADS, length, DIM, seed=seed), entry


def by_hand(online: OnlineMeans, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Means and counts after one step on these micro-batches, entry by entry."""
    means, counts, fresh = online.means.clone(), online.count.clone(), 1 - online.decay
    for h in range(HEADS):
        for c in range(ENTRIES):
            mine = torch.cat([x[:, h][entry[:, h] == c] for x, entry in batches])
            counts[h, c] = online.decay * counts[h, c] + fresh * len(mine)
            means[h, c] += fresh * (mine - means[h, c]).sum(0) / counts[h, c]
    return means, counts


def test_a_step_moves_towards_all_its_micro_batches() -> None:
    learner = Learner()
    for step in range(3):
        batches = [batch(seed=10 * step + i, length=20 + i) for i in (1, 2)]
        expected = by_hand(learner.online, batches)
        for x, entry in batches:
            learner(x, entry).sum().backward()
        learner.online.step()
        torch.testing.assert_close((learner.online.means, learner.online.count), expected, rtol=0, atol=1e-12)


def test_an_entry_without_vectors_stays() -> None:
    learner = Learner()
    before = learner.online.means.clone()
    for seed in range(50):
        learner(*batch(seed)).sum().backward()
        learner.online.step()
    assert torch.equal(learner.online.means[1, -1], before[1, -1])
    assert not torch.equal(learner.online.means[1, 0], before[1, 0])


def test_a_dead_entry_comes_when_it_is_found_again() -> None:
    """After long neglect its count is almost 0: the next vector, even alone, is all that it knows."""
    learner = Learner(decay=0.99)
    for _ in range(2000):
        learner.online.step()
    x = torch.full((1, HEADS, 1, DIM), 7.0, dtype=torch.float64)
    learner(x, torch.zeros(1, HEADS, 1, dtype=torch.int64)).sum().backward()
    learner.online.step()
    torch.testing.assert_close(learner.online.means[:, 0], x[0, :, 0], rtol=0, atol=1e-5)


def test_without_memory_an_entry_is_the_mean_of_the_step() -> None:
    """Or stays, where nothing was assigned: 0 / 0 is no number."""
    learner, (x, entry) = Learner(decay=0.0), batch()
    before = learner.online.means.clone()
    learner(x, entry).sum().backward()
    learner.online.step()
    torch.testing.assert_close(learner.online.means[0, 1], x[:, 0][entry[:, 0] == 1].mean(0), rtol=0, atol=1e-12)
    assert torch.equal(learner.online.means[1, -1], before[1, -1])


def test_means_stay_among_their_vectors() -> None:
    """The quotient of two averages, of which the number began at 0, would take norms of 3 to more than 200."""
    learner = Learner(decay=0.999)
    largest = 0.0
    for seed in range(20):
        x, entry = batch(seed)
        learner(x, entry).sum().backward()
        learner.online.step()
        largest = max(largest, float(x.norm(dim=-1).max()))
        assert learner.online.means.norm(dim=-1).max() <= largest


RUNS: dict[str, Callable[[Learner, Tensor, Tensor], Tensor]] = {
    "plain": lambda learner, x, entry: learner(x, entry),
    "recomputed": lambda learner, x, entry: checkpoint(learner, x, entry, use_reentrant=False),
    "recomputed, reentrant": lambda learner, x, entry: checkpoint(
        learner, x.clone().requires_grad_(), entry, use_reentrant=True
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_every_micro_batch_counts_once(run: Callable[[Learner, Tensor, Tensor], Tensor]) -> None:
    learner, (x, entry) = Learner(), batch()
    y = run(learner, x, entry)
    assert torch.equal(y, x)
    assert not learner.online.pending.any(), "a forward pass must write nothing"
    y.sum().backward()
    assert float(learner.online.pending[..., -1].sum()) == entry.numel()
    means, _ = by_hand(learner.online, [(x, entry)])
    learner.online.step()
    torch.testing.assert_close(learner.online.means, means, rtol=0, atol=1e-12)
    assert not learner.online.pending.any()


def test_gradients_pass_unchanged() -> None:
    learner, (x, entry) = Learner(), batch()
    learner(x, entry).square().sum().backward()
    torch.testing.assert_close(learner.weight.grad, 2 * x.square().sum())


def test_nothing_is_learnt_without_gradients() -> None:
    learner, (x, entry) = Learner(), batch()
    with torch.no_grad():
        learner(x, entry)
    frozen = learner.online.learn(x, x, entry)
    assert frozen is x


def test_a_skipped_step_is_forgotten() -> None:
    learner = Learner()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    learner(*batch()).sum().backward()
    learner.online.step(skipped=True)
    assert not learner.online.pending.any()
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_a_checkpoint_holds_means_and_counts_alone() -> None:
    assert set(Learner().state_dict()) == {"weight", "online.means", "online.count"}


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, partial(nn.Module.to, dtype=torch.bfloat16)])
def test_no_cast_rounds_them_to_16_bits(cast: Callable[[nn.Module], nn.Module]) -> None:
    learner = Learner().float()
    before = learner.online.means.clone()
    cast(learner)
    assert learner.weight.dtype.itemsize == 2
    assert {b.dtype for b in learner.buffers()} == {torch.float32}
    assert torch.equal(learner.online.means, before)
    x, entry = batch()
    learner(x.to(learner.weight.dtype), entry).sum().backward()
    learner.online.step()
    assert learner.online.means.dtype == torch.float32
    assert not torch.equal(learner.online.means, before)
    assert {b.dtype for b in learner.double().buffers()} == {torch.float64}


def test_autocast_does_not_round_sums() -> None:
    """Numbers above 256 have no place in bfloat16."""
    learner = Learner().float()
    x, entry = batch(length=1001)
    with torch.autocast("cpu", torch.bfloat16):
        y = learner(x.float(), torch.zeros_like(entry))
    y.sum().backward()
    assert learner.online.pending[:, 0, -1].tolist() == [2002.0, 2002.0]
    exact = torch.cat([x.sum((0, 2)), x.square().sum((0, 2, 3))[:, None]], 1)
    torch.testing.assert_close(learner.online.pending[:, 0, :-1].double(), exact, rtol=1e-5, atol=1e-3)


# Entries that nobody has


def crowded(online: OnlineMeans) -> tuple[Tensor, Tensor]:
    """All vectors of entry 0, spread widely, and two of entry 1."""
    x = drawn(1, HEADS, 42, DIM, seed=5)
    x[:, :, 40:] = online.means[:, 1:2] + 0.01 * x[:, :, 40:]
    entry = torch.zeros(1, HEADS, 42, dtype=torch.int64)
    entry[:, :, 40:] = 1
    return x, entry


def test_a_dead_entry_moves_to_the_largest_error() -> None:
    learner = Learner(decay=0.5)
    learner.online.dead = 0.1
    learner.online.count.copy_(torch.tensor([[8.0, 8.0, 0.2]] * HEADS))
    x, entry = crowded(learner.online)
    counts = 0.5 * learner.online.count + 0.5 * torch.tensor([40.0, 2.0, 0.0])
    learner(x, entry).sum().backward()
    learner.online.step()
    torch.testing.assert_close(learner.online.means[:, 2], x[0, :, :40].mean(1), rtol=0, atol=1e-12)
    expected = torch.stack([counts[:, 0] / 2, counts[:, 1], counts[:, 0] / 2], 1).double()
    torch.testing.assert_close(learner.online.count, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reason", ["not asked for", "alive", "no error", "skipped"])
def test_else_it_stays(reason: str) -> None:
    learner = Learner(decay=0.5)
    learner.online.dead = 0.0 if reason == "not asked for" else 0.1
    learner.online.count.copy_(torch.tensor([[8.0, 8.0, 30.0 if reason == "alive" else 0.2]] * HEADS))
    before = learner.online.means.clone()
    x, entry = crowded(learner.online)
    if reason == "no error":
        x = learner.online.means[:, 0:1].expand_as(x[0])[None]
        entry = torch.zeros_like(entry)
    learner(x, entry).sum().backward()
    learner.online.step(skipped=reason == "skipped")
    torch.testing.assert_close(learner.online.means[:, 2], before[:, 2], rtol=0, atol=1e-6)
