"""Seeds come together, and only runs that differ in nothing but the mixer are subtracted."""

import math
from dataclasses import replace

import pytest
from scipy import stats

from lmtrain.sweep.comparison import collect
from lmtrain.sweep.seeds import Variants, telling
from tests.lmtrain.sweep.made import a_grid, hoffmann

LUCK = {1: 0.3, 2: -0.2, 3: 0.05}
"""Of a seed, the same for every mixer."""


def of(mixers: dict[str, float], **grid: object) -> Variants:
    """Each mixer's loss is worse by its number; a little less so with seed 1."""
    runs = []
    for mixer, worse in mixers.items():
        runs += a_grid(
            mixers=(mixer,),
            seeds=(1, 2, 3),
            loss=lambda N, D, rho, seed, worse=worse: hoffmann(N, D) + LUCK[seed] + worse * (1 + 0.01 * (seed == 1)),
            **grid,
        )
    return Variants(collect("x", runs))


def test_pairs_take_the_luck_of_the_seed_away() -> None:
    variants = of({"dense": 0.0, "local": -0.1}, sizes=(10**6,), tokens=(10**8,))
    (difference,) = variants.differences()
    pairs = [-0.1 * factor / math.log(2) for factor in (1.01, 1, 1)]
    low, high = stats.t.interval(0.95, 2, sum(pairs) / 3, stats.sem(pairs))
    assert (difference.variant, difference.other, difference.mean.count) == ("local", "dense", 3)
    assert difference.mean.value == pytest.approx(sum(pairs) / 3)
    assert difference.mean.half == pytest.approx((high - low) / 2)
    assert difference.p == pytest.approx(stats.ttest_1samp(pairs, 0).pvalue, rel=1e-6)
    assert difference.beyond_chance


def test_a_verdict_is_of_all_variants_at_its_place() -> None:
    """The same pairs, alone and among others that differ by chance alone."""
    one = of({"dense": 0.0, "local": -0.1}, sizes=(10**6,), tokens=(10**8,)).differences()
    many = of({"dense": 0.0, "local": -0.1, "mosa": 0.0, "vq": 0.0}, sizes=(10**6,), tokens=(10**8,)).differences()
    assert [d.variant for d in many] == ["local", "mosa", "vq"]
    assert many[0].p == pytest.approx(3 * one[0].p)
    assert [d.beyond_chance for d in many] == [True, False, False]


def test_one_pair_has_no_verdict() -> None:
    runs = a_grid(mixers=("dense", "local"), sizes=(10**6,), tokens=(10**8,), seeds=(1,))
    (difference,) = Variants(collect("x", runs)).differences()
    assert difference.p is None
    assert not difference.beyond_chance
    assert "tells nothing" in difference.cells()[-1]


def test_single_pairs_are_shown_only_where_there_is_nothing_else() -> None:
    """Place by place: two seeds here, one there; and one place with one seed."""
    here = a_grid(mixers=("dense", "local"), sizes=(10**6,), tokens=(10**8,), seeds=(1, 2))
    there = a_grid(mixers=("dense", "local"), sizes=(10**6,), tokens=(10**9,), seeds=(1,))
    both = Variants(collect("x", [*here, *there])).differences()
    shown, left_out = telling(both)
    assert [(d.place.partition(" tokens")[0], d.mean.count) for d in shown] == [
        ("size s0, 100,000,000", 2),
        ("all places", 3),
    ]
    assert left_out.startswith("Left out: 1 of a single pair")
    one = Variants(collect("x", there)).differences()
    assert telling(one) == (one, "")


def test_places_are_sizes_and_token_counts_each_with_its_seeds() -> None:
    variants = of({"dense": 0.0, "local": -0.1}, sizes=(10**6, 10**7), tokens=(10**8, 10**9))
    assert variants.places == [f"size {s}, {d} tokens" for s in ("s0", "s1") for d in ("100,000,000", "1,000,000,000")]
    assert all(len(cell.runs) == 3 for cell in variants.cells)
    assert [d.place for d in variants.differences()][-1] == "all places"
    assert variants.differences()[-1].mean.count == 12


def test_forks_of_one_trunk_are_one_pair_of_all_places() -> None:
    """Two sizes, each with a trunk of three budgets: two values, the means of three, and no more."""
    worse = {10**8: 0.1, 10**9: 0.2, 10**10: 0.6}
    runs = []
    for mixer, factor in {"dense": 0.0, "local": 1.0}.items():
        grid = a_grid(
            mixers=(mixer,),
            sizes=(10**6, 10**7),
            tokens=tuple(worse),
            loss=lambda N, D, rho, seed, factor=factor: 3 + factor * worse[D] * (1 if N == 10**6 else 2),
        )
        runs += [replace(run, group=f"{mixer} {run.axes['size']}") for run in grid]
    *places, everywhere = Variants(collect("x", runs)).differences()
    assert [d.mean.count for d in places] == [1] * 6
    trunks = [0.3 / math.log(2), 0.6 / math.log(2)]
    low, high = stats.t.interval(0.95, 1, sum(trunks) / 2, stats.sem(trunks))
    assert (everywhere.place, everywhere.mean.count) == ("all places", 2)
    assert everywhere.mean.value == pytest.approx(sum(trunks) / 2)
    assert everywhere.mean.half == pytest.approx((high - low) / 2)


def test_sparsities_are_variants_beside_a_mixer_without_them() -> None:
    runs = a_grid(seeds=(1,)) + a_grid(mixers=("mosa",), sparsities=(2.0, 16.0), seeds=(1,))
    variants = Variants(collect("x", runs))
    assert variants.names == ["dense", "mosa, rho 2", "mosa, rho 16"]
    assert {d.variant for d in variants.differences()} == {"mosa, rho 2", "mosa, rho 16"}


def test_other_seeds_are_no_pairs() -> None:
    runs = a_grid(sizes=(10**6,), tokens=(10**8,), seeds=(1, 2))
    runs += a_grid(mixers=("local",), sizes=(10**6,), tokens=(10**8,), seeds=(3, 4))
    assert Variants(collect("x", runs)).differences() == []


def test_an_axis_of_another_setting_keeps_runs_apart() -> None:
    runs = [*a_grid(sizes=(10**6,), tokens=(10**8,)), *a_grid(sizes=(10**6,), tokens=(10**8,), mixers=("local",))]
    for number, run in enumerate(runs):
        run.axes["lr"] = 0.001 * (1 + number)
    assert Variants(collect("x", runs)).differences() == []
