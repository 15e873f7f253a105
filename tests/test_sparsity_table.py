"""The tables of sparsity are made from a sweep: differences within a mixer, judged over trunks, and laws."""

import re
from dataclasses import replace
from statistics import fmean
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from lmtrain.sweep.comparison import Collected, collect
from lmtrain.sweep.fit import fit_sweep
from tests.documents import ROOT
from tests.lmtrain.sweep.made import a_grid, hoffmann

RHOS = (2.0, 8.0, 32.0)
SIZES = (10**6, 10**7, 3 * 10**7)
TOKENS = (10**8, 3 * 10**8, 10**9, 3 * 10**9)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sparsity_table

    return sparsity_table


@pytest.fixture
def swept() -> Collected:
    """`far` at three sparsities, budgets as forks of one trunk for each size; `dense` knows no sparsity."""
    random = np.random.default_rng(3)
    runs = a_grid(
        mixers=("far",),
        sizes=SIZES,
        tokens=TOKENS,
        sparsities=RHOS,
        loss=lambda N, D, rho, seed: hoffmann(N, D) - 0.1 * np.log(rho) + 0.02 * random.normal(),
    )
    # the feed-forward layer grows with sparsity, as at equal FLOPs
    runs = [replace(run, parameters=int(run.parameters * (1 + run.sparsity / 100))) for run in runs]
    runs = [replace(run, group=f"{run.axes['size']} {run.sparsity}", bits_per_byte=run.loss) for run in runs]
    dense = a_grid(mixers=("dense",), sizes=SIZES, tokens=TOKENS)
    return collect("x", [*runs, *(replace(run, bits_per_byte=run.loss) for run in dense)])


def test_rows_are_paired_differences_within_a_mixer(made: ModuleType, swept: Collected) -> None:
    loss = {(run.axes["size"], run.tokens, run.sparsity): run.loss for run in swept.of("far")}
    rows = made.rows_of(swept)
    assert [(row["mixer"], row["rho"]) for row in rows] == [("`far`", f"{rho:g}") for rho in RHOS]
    assert rows[0]["minus the least rho"] == ""
    for row, rho in zip(rows[1:], RHOS[1:], strict=True):
        pairs = {size: [loss[size, D, rho] - loss[size, D, 2.0] for D in TOKENS] for size in ("s0", "s1", "s2")}
        trunks = [fmean(some) for some in pairs.values()]
        places = [value for some in pairs.values() for value in some]
        assert row["minus the least rho"] == f"{fmean(places):+.3f}"
        assert (row["trunks"], row["places"]) == (3, 12)
        assert row["± (trunks)"] == f"{stats.t.ppf(0.975, 2) * stats.sem(trunks):.3f}"
        assert row["± (places)"] == f"{stats.t.ppf(0.975, 11) * stats.sem(places):.3f}"
        assert row["bits per byte, size s2, 3,000,000,000 tokens"] == f"{loss['s2', TOKENS[-1], rho]:.3f}"
    alone = [stats.ttest_1samp([fmean([loss[s, D, rho] - loss[s, D, 2.0] for D in TOKENS])
                                for s in ("s0", "s1", "s2")], 0).pvalue for rho in RHOS[1:]]  # fmt: skip
    assert rows[1]["p of all"] == f"{min(1, max(alone[0] * (1 + (alone[0] <= alone[1])), 2 * min(alone))):.2g}"


def test_both_laws_stand_with_their_intervals(made: ModuleType, swept: Collected) -> None:
    laws = [row for row in made.laws_of(swept) if row["mixer"] == "`far`"]
    assert {row["L ="] for row in laws} == {"`E + A (N rho^-g)^-a + B D^-b`", "`E + A N^-a + B D^-b + c ln rho`"}
    for row in laws:
        assert [bool(row[name]) for name in ("g", "c")] == ["rho^-g" in row["L ="], "ln rho" in row["L ="]]
        assert row["b"].count(" to ") == 1
    (added,) = [row for row in laws if row["c"]]
    shown = [float(number) for number in re.findall(r"[-+.e\d]+", added["c"])]
    kept = next(law["c"] for mixer in fit_sweep(swept).to_json()["mixers"] for law in mixer["laws"] if "c" in law)
    assert shown == pytest.approx([kept["value"], kept["low"], kept["high"]], rel=0.05)
    assert shown[0] < 0


def test_the_figure_has_the_differences_with_their_intervals(made: ModuleType, swept: Collected) -> None:
    chart = made.chart_of(swept)
    (series,) = chart.series
    assert (series.label, [point.x for point in series.points]) == ("far", list(RHOS))
    assert [f"{point.y:+.3f}" for point in series.points[1:]] == [
        row["minus the least rho"] for row in made.rows_of(swept)[1:]
    ]
    for point, (x0, low, x1, high) in zip(series.points[1:], series.whiskers, strict=True):
        assert x0 == x1 == point.x
        assert (low + high) / 2 == pytest.approx(point.y)
    assert [value for value, _ in chart.ticks(0)] == list(RHOS)


def test_a_sweep_without_sparsities_has_no_rows(made: ModuleType) -> None:
    assert made.rows_of(collect("x", a_grid())) == []
