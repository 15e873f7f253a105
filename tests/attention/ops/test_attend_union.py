"""One softmax over several sets of keys: that of all of them in one call."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention.lifetimes import FOREVER, Lifetimes, causal, window
from attention.ops.attend import KeySet, attend, attend_reference, attend_union
from attention.ops.merge import merge

LENGTH, NEAR = 40, 6


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def older() -> Lifetimes:
    near = window(LENGTH, NEAR)
    return Lifetimes(near.death, torch.full_like(near.death, FOREVER))


def some_set(seed: int, life: Lifetimes, dim: int = 6, bias: bool = False) -> KeySet:
    keys = life.birth.shape[-1]
    key_bias = drawn(2, 1, keys, seed=seed + 3) if bias else None
    q, k = drawn(2, 4, LENGTH, dim, seed=seed), drawn(2, 2, keys, dim, seed=seed + 1)
    return KeySet(q, k, drawn(2, 2, keys, 5, seed=seed + 2), life, key_bias)


def inputs_of(sets: list[KeySet]) -> list[Tensor]:
    return [t for one in sets for t in (one.q, one.k, one.v, one.key_bias) if t is not None]


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], inputs: list[Tensor]) -> None:
    """Equal in both, and in gradients through both; who meets nobody has lse -inf, whose gradient nobody asks for."""
    weights = [drawn(*t.shape, seed=9).detach() for t in expected]
    results = []
    for out, lse in (found, expected):
        total = (out * weights[0]).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * weights[1]).sum()
        results.append([out, lse, *torch.autograd.grad(total, inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_two_halves_are_one_call() -> None:
    q, k, v = drawn(2, 4, LENGTH, 6, seed=1), drawn(2, 2, LENGTH, 6, seed=2), drawn(2, 2, LENGTH, 5, seed=3)
    sets = [KeySet(q, k, v, window(LENGTH, NEAR)), KeySet(q, k, v, older())]
    check(attend_union(sets), attend_reference(q, k, v, causal(LENGTH)), [q, k, v])


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "learnt bias"])
def test_sets_of_other_widths_and_queries(bias: bool) -> None:
    """At time 0 to 2 nobody is met: the window begins at 3."""
    late = Lifetimes((window(LENGTH, NEAR).birth + 3), (window(LENGTH, NEAR).death + 3))
    sets = [some_set(10, late, dim=6), some_set(20, older(), dim=9, bias=bias), some_set(30, older(), dim=4)]
    parts = [attend_reference(s.q, s.k, s.v, s.life, key_bias=s.key_bias, scale=0.3) for s in sets]
    check(attend_union(sets, scale=0.3), merge(parts), inputs_of(sets))


def test_fixed_bias_and_groups_of_the_fused_kernel() -> None:
    begins = torch.arange(0, LENGTH, 8, dtype=torch.int32).repeat_interleave(3)
    codes = some_set(40, Lifetimes(begins, begins + 8), bias=True)
    codes.key_bias.detach_()[:, :, ::2] = -torch.inf
    codes.key_bias[:, :, 3:6] = -torch.inf  # of the second group nobody is met
    sets = [some_set(10, older()), codes]
    parts = [attend_reference(s.q, s.k, s.v, s.life, key_bias=s.key_bias, scale=0.3) for s in sets]
    check(attend_union(sets, scale=0.3), merge(parts), inputs_of(sets)[:-1])


def test_at_other_times() -> None:
    time = torch.arange(LENGTH, dtype=torch.int32) * 2
    sets = [some_set(10, window(LENGTH, NEAR)), some_set(20, older())]
    parts = [attend(s.q, s.k, s.v, s.life, time=time, scale=0.3) for s in sets]
    check(attend_union(sets, time=time, scale=0.3), merge(parts), inputs_of(sets))


def gated_set() -> KeySet:
    u, tau = drawn(2, 2, LENGTH, seed=60), drawn(2, 4, LENGTH, seed=61)
    return dataclasses.replace(some_set(50, older()), gate=(u, tau))


def test_a_gated_set() -> None:
    sets = [gated_set(), some_set(20, window(LENGTH, NEAR))]
    parts = [attend_reference(s.q, s.k, s.v, s.life, gate=s.gate, scale=0.3) for s in sets]
    assert sets[0].gate is not None
    check(attend_union(sets, scale=0.3), merge(parts), [*inputs_of(sets), *sets[0].gate])


def test_a_threshold_that_is_no_number_is_not_hidden() -> None:
    gated = gated_set()
    assert gated.gate is not None
    with torch.no_grad():
        gated.gate[1][0, 1, [0, 30]] = torch.nan  # at time 0 no gated key is met
    for result in attend_union([gated, some_set(20, window(LENGTH, NEAR))]):
        wrong = result.flatten(3).isnan().any(-1) if result.dim() == 4 else result.isnan()
        assert wrong.nonzero().tolist() == [[0, 1, 0], [0, 1, 30]]


def test_one_set_is_attend() -> None:
    one = some_set(10, causal(LENGTH))
    check(attend_union([one]), attend(one.q, one.k, one.v, one.life), [one.q, one.k, one.v])


@pytest.mark.parametrize("life", [window(LENGTH, NEAR), causal(LENGTH)], ids=["tiles", "fused kernel"])
@pytest.mark.parametrize("wanted", ["k, columns", "k", "columns", "neither"])
def test_more_columns(life: Lifetimes, wanted: str) -> None:
    """As if they stood in q and k, whoever of these wants a gradient."""
    one, of_q, of_k = some_set(10, life), drawn(2, 4, LENGTH, 3, seed=20), drawn(2, 1, LENGTH, 3, seed=21)
    one.k.requires_grad_("k" in wanted.split(", "))
    of_k.requires_grad_("columns" in wanted)
    q = torch.cat([one.q, of_q], -1)
    k = torch.cat([one.k, of_k.expand(-1, 2, -1, -1)], -1)
    inputs = [t for t in (one.q, one.k, one.v, of_q, of_k) if t.requires_grad]
    with_columns = KeySet(one.q, one.k, one.v, one.life, columns=(of_q, of_k))
    check(attend_union([with_columns]), attend_reference(q, k, one.v, one.life), inputs)


@pytest.mark.parametrize(("keys", "columns", "less"), [(True, True, 0), (True, False, 3), (False, False, 9)])
def test_no_work_for_gradients_that_nobody_wants(keys: bool, columns: bool, less: int) -> None:
    one, of_q, of_k = some_set(10, causal(LENGTH)), drawn(2, 4, LENGTH, 3, seed=20), drawn(1, 1, LENGTH, 3, seed=21)
    one.k.requires_grad_(keys)
    of_k.requires_grad_(columns)
    out = attend_union([KeySet(one.q, one.k, one.v, one.life, columns=(of_q, of_k))])[0]
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    pairs = 2 * 4 * LENGTH * (LENGTH + 1) // 2
    assert counter.get_total_flops() == pairs * 2 * (3 * 9 - less + 2 * 5)


def test_columns_that_do_not_fit() -> None:
    one, of_q = some_set(10, causal(LENGTH)), drawn(2, 4, LENGTH, 3, seed=20)
    for columns, message in (
        ((of_q[:, :2], of_q[:, :2]), r"columns\[0\]: expected shape \[2, 4, 40, width\] as q's"),
        ((of_q, of_q[:, :2, :, :2]), r"columns\[1\]: expected a shape broadcastable to"),
        ((of_q.float(), of_q[:, :2]), r"columns\[0\]: expected type torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            attend_union([KeySet(one.q, one.k, one.v, one.life, columns=columns)])


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="sets: expected at least one set of keys, got none"):
        attend_union([])
    one = some_set(10, causal(LENGTH))
    with pytest.raises(ValueError, match="v: expected shape"):
        attend_union([one, KeySet(one.q, one.k, one.v[:, :, 1:], one.life)])
