"""The threshold of SPARSEK against bisection, its gradient against autograd, its lifetimes against c."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from entmax import budget_bisect
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention.lifetimes import FOREVER
from attention.ops import sparsek
from attention.ops.select import streaming_top_k
from attention.ops.sparsek import sparsek_threshold


@dataclass(frozen=True)
class Case:
    """Scores of two heads, spread as given; `values`: so many different ones only."""

    length: int
    keep: int
    candidates: int
    delay: int = 0
    spread: float = 1.0
    slope: float = 0.0
    values: int | None = None
    documents: tuple[int, ...] = ()

    @property
    def u(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.length + self.candidates)
        shape = (1, 2, self.length)
        if self.values is not None:
            return self.spread * torch.randint(self.values, shape, generator=generator).double()
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return self.spread * drawn + self.slope * torch.arange(self.length)

    @property
    def start(self) -> Tensor | None:
        if not self.documents:
            return None
        edges = [0, *self.documents, self.length]
        return torch.tensor([begin for begin, end in itertools.pairwise(edges) for _ in range(begin, end)])

    def threshold(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return sparsek_threshold(u, self.keep, self.candidates, delay=self.delay, start=self.start)

    def candidates_at(self, u: list[float], t: int) -> list[int]:
        """The best first."""
        begin = 0 if self.start is None else int(self.start[t])
        return sorted(range(begin, t - self.delay + 1), key=lambda j: (u[j], j), reverse=True)[: self.candidates]


CASES = {
    "plain": Case(60, 4, 8),
    "delayed": Case(60, 4, 8, delay=6),
    "all are candidates": Case(150, 6, 150, spread=0.3),
    "over many chunks": Case(300, 5, 70, delay=5, spread=0.3),
    "so alike that candidates bind": Case(90, 4, 6, spread=0.05),
    "far apart": Case(80, 3, 5, spread=5.0),
    "rising": Case(90, 3, 5, spread=0.5, slope=0.05),
    "falling": Case(90, 3, 20, slope=-0.05),
    "hard top-k": Case(40, 4, 4),
    "one": Case(70, 1, 70),
    "ties": Case(90, 3, 5, spread=0.7, values=3),
    "ties a step apart": Case(90, 3, 9, spread=1.0, values=3),
    "documents": Case(170, 3, 6, delay=4, spread=2.0, documents=(1, 40, 43, 130)),
    "one token": Case(1, 2, 4),
    "longer delay than tokens": Case(7, 2, 4, delay=9),
}
of_all = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def by_bisection(scores: list[float], keep: int) -> float:
    """tau of scores given from the best to the least."""
    if len(scores) <= keep:
        return -math.inf
    if scores[keep - 1] - scores[keep] >= 1:
        return (scores[keep - 1] - 1 + scores[keep]) / 2
    low, high = scores[-1] - 1, scores[0]
    for _ in range(100):
        middle = (low + high) / 2
        if sum(min(max(s - middle, 0.0), 1.0) for s in scores) > keep:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@of_all
def test_it_is_the_projection(case: Case) -> None:
    u = case.u
    tau, _ = case.threshold(u)
    for head, scores in enumerate(u[0].tolist()):
        for t in range(case.length):
            expected = by_bisection([scores[j] for j in case.candidates_at(scores, t)], case.keep)
            assert tau[0, head, t].item() == pytest.approx(expected, abs=1e-13, rel=1e-13)


@of_all
def test_a_lifetime_is_where_c_is_not_zero(case: Case) -> None:
    u = case.u
    tau, death = case.threshold(u)
    for head, scores in enumerate(u[0].tolist()):
        for t in range(case.length):
            there = case.candidates_at(scores, t)
            alive = {j for j in there if scores[j] > tau[0, head, t]}
            begin = 0 if case.start is None else int(case.start[t])
            living = {j for j in range(begin, case.length) if j + case.delay <= t < death[0, head, j]}
            assert living == alive
    ends = torch.full((case.length,), case.length) if case.start is None else _ends(case.start)
    assert bool(((death == FOREVER) | (death <= ends)).all())
    assert bool((death[..., ends < case.length] != FOREVER).all())


def _ends(start: Tensor) -> Tensor:
    return torch.searchsorted(start, start, right=True)


@of_all
def test_what_is_kept_sums_to_keep(case: Case) -> None:
    u = case.u
    tau, death = case.threshold(u)
    time = torch.arange(case.length)
    alive = (time + case.delay <= time[:, None]) & (time[:, None] < death[..., None, :])
    if case.start is not None:
        alive &= case.start == case.start[:, None]
    c = ((u[..., None, :] - tau[..., None]).clamp(0, 1) * alive).sum(-1)
    enough = tau > -math.inf
    assert c[enough].numel() == 0 or (c[enough] - case.keep).abs().max() < 1e-12


def closed_form(case: Case, u: Tensor, tau: Tensor) -> Tensor:
    """tau by autograd's means: the mean of those with 0 < c < 1, whoever they are."""
    rows = []
    for head in range(2):
        for t in range(case.length):
            known = tau[0, head, t].item()
            mine = u[0, head, case.candidates_at(u[0, head].tolist(), t)]
            c = mine.detach() - known
            inside, full = (c > 0) & (c < 1), int((c >= 1).sum())
            some = known > -math.inf and bool(inside.any())
            rows.append((mine[inside].sum() + full - case.keep) / inside.sum() if some else u.new_tensor(0.0))
    return torch.stack(rows).view(1, 2, -1)


GENERIC = {name: case for name, case in CASES.items() if case.values is None}


@pytest.mark.parametrize("case", GENERIC.values(), ids=GENERIC.keys())
def test_the_gradient_is_exact(case: Case) -> None:
    u = case.u.requires_grad_()
    tau, _ = case.threshold(u)
    expected = closed_form(case, u, tau.detach())
    weights, none = torch.randn(tau.shape, dtype=torch.float64), tau == -math.inf
    (ours,) = torch.autograd.grad(tau, u, weights.masked_fill(none, math.nan))  # what leads to -inf is no number
    (theirs,) = torch.autograd.grad((expected * weights.masked_fill(none, 0.0)).sum() + 0 * u.sum(), u)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_the_gradient_is_that_of_small_differences() -> None:
    """Of scores so near each other that nobody is ever 1 above the rest."""
    case = Case(40, 4, 7, delay=3, spread=0.1, documents=(1, 16))

    def finite(u: Tensor) -> Tensor:
        tau = case.threshold(u)[0]
        return torch.where(tau > -math.inf, tau, 0.0)

    assert torch.autograd.gradcheck(finite, case.u.requires_grad_(), eps=1e-7, atol=1e-6)


def test_far_apart_there_is_no_gradient_and_no_nan() -> None:
    """The best two lie 1 or more above the rest: 0 / 0 in a closed form that forgets it."""
    u = torch.tensor([[[5.0, 4.0, 1.0, 0.0, 3.0]]], requires_grad=True)
    tau, death = sparsek_threshold(u, 2, 5)
    assert tau[0, 0, 2:].tolist() == [2.0, 2.0, 3.0]
    assert death[0, 0].tolist() == [FOREVER, FOREVER, 2, 3, 4]
    (grad,) = torch.autograd.grad(tau[..., 2:].sum(), u)
    assert not grad.any()


def test_one_of_all_is_sparsemax() -> None:
    """Martins and Astudillo (2016): the Euclidean projection onto the simplex, by its own closed form."""
    u = CASES["one"].u
    tau, _ = CASES["one"].threshold(u)
    for t in range(1, 70):
        z = u[0, 0, : t + 1].sort(descending=True).values
        above = 1 + torch.arange(1, t + 2) * z > z.cumsum(0)
        size = int(above.sum())
        assert tau[0, 0, t].item() == pytest.approx(float((z[:size].sum() - 1) / size), abs=1e-13)


def test_as_many_candidates_as_are_kept_is_hard_selection() -> None:
    u = CASES["hard top-k"].u
    tau, death = CASES["hard top-k"].threshold(u)
    assert bool((tau == -math.inf).all())
    assert torch.equal(death, streaming_top_k(u, 4))


@pytest.mark.parametrize("name", ["plain", "delayed", "so alike that candidates bind", "over many chunks", "ties"])
@pytest.mark.parametrize("cut", [1, 9, 41])
def test_the_living_are_all_that_matters(name: str, cut: int) -> None:
    """Behind a cut, from those who live there, the last `delay` tokens, and padding in front: the same c."""
    case = CASES[name]
    u, time = case.u[:, :1], torch.arange(case.length)
    tau, death = case.threshold(u)
    held = (death[0, 0] >= cut) & (time < cut) | (time >= cut - case.delay)
    rows = time[held | (time >= cut)]
    padded = torch.cat([torch.tensor([[[9.0, -9.0]]], dtype=torch.float64), u[..., rows]], -1)
    start = torch.cat([torch.tensor([-1, -1]), torch.zeros_like(rows)])
    again, died = sparsek_threshold(padded, case.keep, case.candidates, delay=case.delay, start=start)
    for place, t in enumerate(rows.tolist(), start=2):
        if t < cut:
            continue
        for other, j in enumerate(rows.tolist(), start=2):
            ours = _share(padded, again, died, case.delay, place, other)
            assert ours == pytest.approx(_share(u, tau, death, case.delay, t, j), abs=1e-13)


def _share(u: Tensor, tau: Tensor, death: Tensor, delay: int, t: int, j: int) -> float:
    if not j + delay <= t < death[0, 0, j]:
        return 0.0
    return float((u[0, 0, j] - tau[0, 0, t]).clamp(0, 1))


def test_in_float32_it_is_as_near_as_float32_goes() -> None:
    case = CASES["over many chunks"]
    rounded = case.u.float()
    tau, death = case.threshold(rounded)
    exact, expected = case.threshold(rounded.double())
    assert tau.dtype == torch.float32
    assert torch.equal(tau, exact.float())
    assert torch.equal(death, expected)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.numbers = max(self.numbers, t.numel() if isinstance(t, Tensor) else 0)
        return out


def test_there_is_no_object_of_tokens_by_candidates() -> None:
    length, candidates = 6000, 3000
    u = torch.randn(1, 1, length).requires_grad_()
    with Largest() as seen:
        tau, _ = sparsek_threshold(u, 1500, candidates)
        forward = seen.numbers
        seen.numbers = 0
        torch.autograd.grad(tau[..., 1600:].sum(), u)
    assert forward <= sparsek.AT_ONCE + 2**17 < length * candidates / 10
    assert length <= seen.numbers <= length + 1


@pytest.mark.parametrize("name", ["over many chunks", "documents", "ties"])
def test_how_many_chunks_go_at_once_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    tau, death = case.threshold(case.u)
    monkeypatch.setattr(sparsek, "AT_ONCE", 1)
    for ours, theirs in zip(case.threshold(case.u), (tau, death), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("keep", [2, 5])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_it_is_what_entmax_says(keep: int, spread: float) -> None:
    """c of every prefix and its gradient, of another implementation: `entmax`, by bisection (Peters et al., 2019)."""
    u = (spread * torch.randn(1, 1, 40, dtype=torch.float64)).requires_grad_()
    tau, death = sparsek_threshold(u, keep, 40)
    for t in range(keep, 40):
        here = u[0, 0, : t + 1]
        ours = torch.where(t < death[0, 0, : t + 1], (here - tau[0, 0, t]).clamp(0, 1), 0.0)
        theirs = budget_bisect(here, budget=keep, dim=0, n_iter=60)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        weights = torch.randn(t + 1, dtype=torch.float64)
        between = (ours > 1e-9) & (ours < 1 - 1e-9)
        if int(between.sum()) == 0:
            continue  # hard: any tau of an interval, no gradient in either
        ours, theirs = (torch.autograd.grad((c * weights).sum(), u, retain_graph=True)[0] for c in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_from_a_score_that_is_not_finite_on_there_is_no_threshold(value: float) -> None:
    """To the end of its document; before it and in other documents and rows all is as without it."""
    case = CASES["documents"]
    u = case.u
    tau, death = case.threshold(u)
    u[0, 1, 60] = value
    wrong, died = case.threshold(u)
    assert torch.equal(wrong[0, 0], tau[0, 0])
    assert torch.equal(died[0, 0], death[0, 0])
    assert wrong[0, 1, 64:130].isnan().all()
    others = torch.cat([torch.arange(64), torch.arange(130, 170)])
    assert torch.equal(wrong[0, 1, others], tau[0, 1, others])
    token = torch.arange(170)
    assert bool(((died == FOREVER) | ((died >= token) & (died < 170))).all())
    u.requires_grad_()
    assert torch.autograd.grad(case.threshold(u)[0].sum(), u)[0].shape == u.shape


@pytest.mark.parametrize(("keep", "candidates", "delay"), [(0, 4, 0), (5, 4, 0), (2, 4, -1)])
def test_what_does_not_fit_is_named(keep: int, candidates: int, delay: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 <= keep <= candidates .*{keep}, {candidates} and {delay}"):
        sparsek_threshold(torch.zeros(1, 1, 3), keep, candidates, delay=delay)
