"""`lmtrain sweep fit`: each mixer's law with its doubts, in words and as JSON."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from lmtrain.sweep.comparison import collect
from lmtrain.sweep.fit import fit_sweep
from tests.lmtrain.sweep.made import a_grid, hoffmann, written


def noisy(factor: float):
    """Losses of the law with 0.3 % noise, drawn in the order of the grid; N counts `factor` times."""
    random = np.random.default_rng(5)
    return lambda N, D, rho, seed: hoffmann(factor * N * rho**-0.3, D) * (1 + 0.003 * random.normal())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = a_grid(mixers=("dense",), loss=noisy(1), seeds=(1, 2))
    runs += a_grid(mixers=("mosa",), sizes=(10**6, 10**7, 3 * 10**7, 10**8), sparsities=(2.0, 8.0, 32.0), loss=noisy(2))
    runs += a_grid(mixers=("few",), sizes=(10**6, 10**7))
    return written(tmp_path_factory.mktemp("fits") / "sweep", runs)


def test_numbers_of_the_json_are_those_of_the_losses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "fit", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((folder / "fit.json").read_text())
    dense, few, mosa = sorted(shown["mixers"], key=lambda mixer: mixer["mixer"])
    assert dense["laws"][0]["n*"]["value"] == pytest.approx(0.2849 / (0.2849 + 0.3392), abs=0.02)
    assert dense["flops_per_parameter_and_token"]["median"] == pytest.approx(6)
    assert mosa["laws"][0]["formula"] == "L = E + A (N rho^-g)^-a + B D^-b"
    assert mosa["laws"][0]["g"]["value"] == pytest.approx(0.3, abs=0.02)
    assert few["laws"] == []
    assert "sizes N: 2 distinct, at least 4" in few["refusal"]


def test_the_text_has_no_number_of_a_law_without_its_interval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "fit", str(folder)]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("    E ") and " g " in line]
    assert line.count(" to ") == 6
    assert "N*(C) grows as C^" in text
    assert "biased" in text
    assert "too few points for L = E + A N^-a + B D^-b: sizes N: 2 distinct" in text


def test_runs_at_a_worse_setting_are_no_points_of_the_law() -> None:
    good = [replace(run, axes=run.axes | {"lr": 1}) for run in a_grid()]
    bad = [replace(run, name=f"{run.name}-2", loss=2 * run.loss, bits_per_byte=2 * run.bits_per_byte) for run in good]
    (fit,) = fit_sweep(collect("x", [*good, *bad])).fits
    assert {run.name for run in fit.outdone} == {run.name for run in bad}
    assert fit.laws[0].interval("a").value == pytest.approx(0.3392, abs=1e-3)


def test_losses_that_do_not_depend_on_size_are_said_to(folder: Path) -> None:
    random = np.random.default_rng(0)
    flat = a_grid(loss=lambda N, D, rho, seed: 1 + 400 * D**-0.28 + 1e-9 * np.log(N) + 0 * random.normal())
    text = fit_sweep(collect("x", flat)).format()
    assert "the loss does not fall with N in these runs" in text


def test_a_loss_that_would_fall_below_nothing_leaves_the_irreducible_one_open() -> None:
    """Losses below those of the law by more than its E: the least E that is allowed, 0, is no finding."""
    text = fit_sweep(collect("x", a_grid(loss=lambda N, D, rho, seed: hoffmann(N, D) - 1.8))).format()
    assert "E is 0: these runs do not tell the loss that no size and no tokens would lower" in text
    assert "E is 0" not in fit_sweep(collect("x", a_grid())).format()


def test_an_exponent_whose_interval_is_all_that_was_searched_is_said_to_be_open() -> None:
    random = np.random.default_rng(0)
    runs = a_grid(loss=lambda N, D, rho, seed: hoffmann(1e30, D) + 0.003 * random.normal())
    assert "a, or an end of its interval, is at the edge" in fit_sweep(collect("x", runs)).format()


def test_a_folder_without_results_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("fit", "report"):
        assert main(["sweep", action, str(tmp_path)]) == 2
        assert "no finished run in it" in capsys.readouterr().err
