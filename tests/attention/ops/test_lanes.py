"""Lanes against lists of who meets whom, made by loops over documents, lanes and times."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attention.lifetimes import FOREVER
from attention.ops.lanes import Lanes, Permutation, attend_lanes, make_lanes, met_by

T = 83


@dataclass
class Case:
    """lane and start [B or 1, G or 1, T]; the last `queries` tokens ask."""

    lane: Tensor
    start: Tensor
    queries: int = T
    heads: int = 4
    kv_heads: int = 2
    window: int | None = None
    limit: int | None = None  # of time, which runs by 1, 2, 3, 1, 2, 3, ..
    strict: bool = False

    def make(self) -> Lanes:
        limit = None if self.limit is None else (SLOW, self.limit)
        settings = {"queries": self.queries, "window": self.window, "limit": limit, "strict": self.strict}
        return make_lanes(self.lane, self.start, **settings)

    def tensors(self) -> list[Tensor]:
        """q, k, v of two examples."""
        generator = torch.Generator().manual_seed(1)
        shapes = (2, self.heads, self.queries, 8), (2, self.kv_heads, T, 8), (2, self.kv_heads, T, 6)
        return [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def met(self, example: int, head: int) -> list[list[int]]:
        """The keys that each query meets, in the order of their time."""
        row = [x.expand(2, self.kv_heads, T)[example, head].tolist() for x in (self.start, self.lane)]
        of_token = list(zip(*row, strict=True))
        lists = []
        for i in range(T - self.queries, T):
            mates = [j for j in range(i + 1) if of_token[j] == of_token[i]]
            if self.window is not None:
                mates = mates[-self.window :]
            if self.limit is not None:
                mates = [j for j in mates if SLOW[0, 0, i] - SLOW[0, 0, j] < self.limit]
            lists.append([j for j in mates if j < i or not self.strict])
        return lists

    def expected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse by one softmax over each query's list."""
        outs, lses = [], []
        for b in range(2):
            for h in range(self.heads):
                g = h // (self.heads // self.kv_heads)
                for i, keys in enumerate(self.met(b, g)):
                    logits = k[b, g, keys] @ q[b, h, i] / math.sqrt(8)
                    outs.append(logits.softmax(0) @ v[b, g, keys])
                    lses.append(logits.logsumexp(0))
        shape = (2, self.heads, self.queries)
        return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


TIME = torch.arange(T)[None, None]
NONE = torch.zeros_like(TIME)
SLOW = (1 + TIME % 3).cumsum(-1)


def drawn(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(3))


def documents() -> Tensor:
    """[2, 1, T]: three documents in the first row, one in the second."""
    first = torch.tensor([0] * 20 + [20] + [21] * (T - 21))
    return torch.stack([first, torch.zeros_like(first)])[:, None]


def cached() -> Case:
    """Rows of a cache, some of them dead or padding, others in each head, before 13 new tokens."""
    dead = drawn(2, 2, T, below=3) == 0
    dead[..., T - 13 :] = False
    return Case(TIME % 7, torch.where(dead, FOREVER, 0), queries=13)


CASES = {
    "lanes of unequal length": lambda: Case(TIME % 9, NONE),
    "strict": lambda: Case(TIME % 9, NONE, strict=True),
    "one lane": lambda: Case(NONE, NONE, kv_heads=4),
    "a lane for each": lambda: Case(TIME, NONE),
    "a lane for each, strict": lambda: Case(TIME, NONE, strict=True),
    "grids of documents": lambda: Case((TIME - documents()) % 5, documents(), strict=True),
    "clusters": lambda: Case(drawn(2, 2, T, below=6), NONE),
    "clusters with a window": lambda: Case(drawn(2, 2, T, below=4), documents(), window=5),
    "strict with a window": lambda: Case(drawn(1, 2, T, below=4), NONE, window=5, strict=True),
    "window of one": lambda: Case(drawn(1, 2, T, below=4), NONE, window=1),
    "cached": cached,
    "one more token": lambda: Case(TIME % 9, NONE, queries=1, strict=True),
    "cached clusters": lambda: Case(drawn(2, 2, T, below=5), documents(), queries=30, window=4),
    "a limit of time": lambda: Case(drawn(2, 2, T, below=4), documents(), limit=17),
    "a limit and a window": lambda: Case(drawn(1, 2, T, below=3), documents(), window=4, limit=20, queries=20),
    "a limit of one": lambda: Case(TIME % 5, NONE, limit=1),
    "a limit beyond all time": lambda: Case(TIME % 5, NONE, limit=2**31 - 1, queries=3),
    "large numbers": lambda: Case(2**31 - 1 - TIME % 3, NONE + 2**31 - 2),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_everyone_meets_the_lane_behind_it(make) -> None:
    case = make()
    inputs = case.tensors()
    out, lse = attend_lanes(*inputs, case.make())
    expected, expected_lse = case.expected(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)
    weights, met = torch.randn_like(out), (expected_lse > -torch.inf).detach()
    gradients = [
        torch.autograd.grad((o * weights).sum() + n[met].square().sum(), inputs)
        for o, n in ((out, lse), (expected, expected_lse))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("first", "stop"), [(0, T), (11, 12), (17, 33), (5, 5)])
def test_who_is_met_by_some_of_the_queries(first: int, stop: int, strict: bool) -> None:
    lane, start, window = drawn(2, 3, T, below=4), documents(), 3
    of = (start + 1000 * lane).tolist()
    met = torch.zeros(2, 3, T, dtype=torch.bool)
    for row in range(2):
        for head, lanes_of in enumerate(of[row]):
            for query in range(first, stop):
                members = [j for j in range(query + 1) if lanes_of[j] == lanes_of[query]][-window:]
                met[row, head, members[:-1] if strict else members] = True
    assert torch.equal(met_by(make_lanes(lane, start, window=window, strict=strict), first, stop), met)


def test_what_is_alike_is_made_once() -> None:
    lanes = make_lanes(TIME % 9, NONE)
    assert lanes.keys is not None
    assert lanes.keys.order.shape == lanes.life.death.shape == (1, 1, T)
    assert lanes.time is None
    of_heads = make_lanes(drawn(1, 2, T, below=4), documents(), queries=3)
    assert of_heads.life.death.shape == (2, 2, T)
    assert of_heads.time.shape == (2, 2, 3)
    assert bool((of_heads.time.diff() > 0).all())


@pytest.mark.parametrize("lists", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_permutation_and_its_reverse(lists: tuple[int, int], tokens_first: bool) -> None:
    order = torch.rand(*lists, 5, generator=torch.Generator().manual_seed(0)).argsort(-1)
    permutation = Permutation.of(order)
    x = torch.randn(2, 5, 6, 4).transpose(1, 2) if tokens_first else torch.randn(2, 6, 5, 4)
    x.requires_grad_()
    y = permutation.apply(x)
    for b in range(2):
        for h in range(6):
            mine = order.expand(2, -1, -1)[b, h // (6 // lists[1])]
            assert torch.equal(y[b, h], x[b, h, mine])
    assert torch.equal(permutation.undo(y), x)
    (gradient,) = torch.autograd.grad((y * y.detach()).sum(), x)
    assert torch.equal(gradient, x)
    assert torch.equal(permutation.apply(x[..., 0]), y[..., 0])


def test_gradients_of_gradients() -> None:
    permutation = Permutation.of(torch.tensor([[[2, 0, 1]]]))
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(permutation.apply, x)
