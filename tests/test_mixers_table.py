"""The README's table of mixers is made from a sweep: means over seeds, best first, of one size alone."""

from types import ModuleType

import pytest
from scipy import stats

from lmtrain.sweep.comparison import collect
from lmtrain.sweep.seeds import Variants
from tests.documents import ROOT
from tests.lmtrain.sweep.made import a_grid

LOSSES = {"dense": (2.0, 2.1, 2.4), "local": (1.9, 1.8, 2.0)}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import mixers_table

    return mixers_table


def test_rows_are_means_with_their_interval_best_first(made: ModuleType) -> None:
    runs = []
    for mixer, losses in LOSSES.items():
        alike = {"mixers": (mixer,), "sizes": (10**6,), "tokens": (10**8,), "seeds": (1, 2, 3)}
        runs += a_grid(**alike, loss=lambda N, D, rho, seed, losses=losses: losses[seed - 1])
    collected = collect("x", [run.__class__(**vars(run) | {"bits_per_byte": run.loss}) for run in runs])
    rows = made.rows_of(collected, Variants(collected), {"local": 1234.5, "dense": 1000.0})
    assert [row["mixer"] for row in rows] == ["`local`", "`dense`"]
    half = stats.t.ppf(0.975, 2) * stats.sem(LOSSES["dense"])
    assert rows[1]["bits per byte"] == f"{sum(LOSSES['dense']) / 3:.3f} ± {half:.3f}"
    assert [row["tokens/s"] for row in rows] == ["1,234", "1,000"]
    assert (rows[0]["seeds"], rows[0]["strict"], rows[0]["state at 64k, bytes"]) == (3, "yes", "5,000,000")


def test_several_sizes_are_no_table(made: ModuleType) -> None:
    collected = collect("x", a_grid())
    with pytest.raises(ValueError, match="one table for size s0, 100,000,000 tokens and"):
        made.rows_of(collected, Variants(collected), {})
