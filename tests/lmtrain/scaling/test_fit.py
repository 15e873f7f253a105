"""Laws are found again in losses that follow them, told apart from chance, and refused where runs are too few."""

import math

import numpy as np
import pytest
from scipy import optimize

from lmtrain.scaling import EFFECTIVE, LOGARITHM, PLAIN, Fitted, Form, Points, fit, fit_sparse, held_out, problems
from tests.lmtrain.sweep.made import hoffmann

A, B = 0.3392, 0.2849  # exponents of `hoffmann`


def grid(sizes: int = 6, counts: int = 5) -> tuple[np.ndarray, np.ndarray]:
    N, D = np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(1e8, 1e10, counts), indexing="ij")
    return N.ravel(), D.ravel()


def losses(N: np.ndarray, D: np.ndarray) -> np.ndarray:
    return np.array([hoffmann(n, d) for n, d in zip(N, D, strict=True)])


def value(fitted: Fitted, name: str) -> float:
    return fitted.interval(name).value


@pytest.mark.parametrize("robust", [False, True])
def test_noise_free_losses_give_the_law_back(robust: bool) -> None:
    N, D = grid(8, 8)
    fitted = fit(Points.of(N, D, losses(N, D)), robust=robust, resamples=3)
    found = [value(fitted, name) for name in ("E", "A", "B", "a", "b", "n*")]
    assert found[3:] == pytest.approx([A, B, B / (A + B)], abs=1e-4)
    assert found[:3] == pytest.approx([1.69, 406.4, 410.7], rel=1e-3)
    assert fitted.held_out_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_coefficients_are_those_of_nonnegative_least_squares(seed: int) -> None:
    """At the exponents found no other E, A, B >= 0 do better; by scipy's own solver. Losses here follow no law."""
    N, D = grid()
    loss = np.random.default_rng(seed).uniform(1, 3, N.size)
    fitted = fit(Points.of(N, D, loss), robust=False, resamples=2)
    a, b = value(fitted, "a"), value(fitted, "b")
    columns = np.stack([np.ones_like(N), (N / 1e8) ** -a, (D / 1e9) ** -b], axis=1) / loss[:, None]
    _, norm = optimize.nnls(columns, np.ones_like(loss))
    assert fitted.law.error[0] == pytest.approx(norm**2 / N.size, rel=1e-6)
    assert all(value(fitted, name) >= 0 for name in "EAB")


def test_no_law_nearby_is_better() -> None:
    """Exponents are a least, against scipy's simplex search from the true ones."""
    N, D = grid()
    loss = losses(N, D) * (1 + 0.005 * np.random.default_rng(1).normal(size=N.size))

    def squares(exponents: np.ndarray) -> float:
        columns = np.stack([np.ones_like(N), (N / 1e8) ** -exponents[0], (D / 1e9) ** -exponents[1]], axis=1)
        return float(optimize.nnls(columns / loss[:, None], np.ones_like(loss))[1] ** 2)

    theirs = optimize.minimize(squares, [A, B], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-14})
    fitted = fit(Points.of(N, D, loss), robust=False, resamples=2)
    assert fitted.law.error[0] * N.size <= theirs.fun * (1 + 1e-6)


def test_one_outlier_moves_a_robust_fit_little() -> None:
    N, D = grid()
    loss = losses(N, D)
    loss[3] *= 1.1
    points = Points.of(N, D, loss)
    robust, squares = fit(points, resamples=2), fit(points, robust=False, resamples=2)
    assert [value(robust, "a"), value(robust, "b")] == pytest.approx([A, B], abs=1e-3)
    assert abs(value(squares, "b") - B) > 5e-3
    assert np.flatnonzero(robust.outliers).tolist() == [3]


def test_swapping_n_and_d_swaps_the_exponents() -> None:
    N, D = grid()
    swapped = fit(Points.of(D, N, losses(N, D)), resamples=2)
    assert [value(swapped, "a"), value(swapped, "b")] == pytest.approx([B, A], abs=1e-4)


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        (EFFECTIVE, lambda N, D, rho: hoffmann(N * rho**-0.3, D)),
        (LOGARITHM, lambda N, D, rho: hoffmann(N, D) + 0.03 * math.log(rho)),
        (LOGARITHM, lambda N, D, rho: hoffmann(N, D) - 0.03 * math.log(rho)),
    ],
)
def test_the_sparsity_law_that_holds_is_chosen(form: Form, loss) -> None:
    N, D = (np.repeat(x, 4) for x in grid(5, 5))
    rho = np.tile([2.0, 4.0, 16.0, 64.0], 25)
    points = Points.of(N, D, [loss(*row) for row in zip(N, D, rho, strict=True)], rho)
    best, other = fit_sparse(points, resamples=2)
    assert best.form is form
    assert [value(best, "a"), value(best, "b")] == pytest.approx([A, B], abs=1e-4)
    assert best.held_out_error < other.held_out_error
    if form is EFFECTIVE:
        assert value(best, "g") == pytest.approx(0.3, abs=1e-3)
    else:
        assert abs(value(best, "c")) == pytest.approx(0.03, abs=1e-4)


def test_too_few_points_are_refused_in_words() -> None:
    N, D = grid(3, 3)
    with pytest.raises(ValueError, match=r"sizes N: 3 distinct, at least 4.*token counts D: 3 distinct, at least 4"):
        fit(Points.of(N, D, losses(N, D)))
    line = np.geomspace(1e7, 1e9, 5)
    with pytest.raises(ValueError, match="runs: 5 for 5 unknowns, at least 6"):
        fit(Points.of(line, 20 * line, losses(line, 20 * line)))


def test_sparsity_that_rises_with_size_tells_nothing() -> None:
    N, D = grid()
    rho = (N / 5e6) ** 0.5
    assert problems(Points.of(N, D, losses(N, D), rho), EFFECTIVE) == [
        "N and sparsity rise together, so nobody can tell which of them moves the loss"
    ]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"loss: {bad} is no number > 0"):
        Points.of([1e6, 2e6], [1e8, 1e8], [2.0, bad])


def test_held_out_runs_are_the_largest_and_judged_by_the_rest() -> None:
    """Only the largest runs leave the law, so the error is what they were moved by."""
    N, D = grid()
    cost = N * D
    largest = cost >= np.sort(cost)[-6] * (1 - 1e-9)
    loss = np.where(largest, 1.05, 1.0) * losses(N, D)
    assert held_out(Points.of(N, D, loss)) == pytest.approx(np.full(largest.sum(), 1 / 1.05 - 1), abs=1e-5)


def test_the_best_size_is_the_least_on_its_budget() -> None:
    N, D = grid()
    fitted = fit(Points.of(N, D, losses(N, D)), resamples=2)
    C = 6 * 1e8 * 1e9
    sizes = np.geomspace(1e7, 1e9, 200001)
    least = sizes[np.argmin(1.69 + 406.4 * sizes**-A + 410.7 * (C / (6 * sizes)) ** -B)]
    assert fitted.best_size(C, 6).value == pytest.approx(least, rel=1e-3)


def test_predictions_have_bounds_that_widen_beyond_the_runs() -> None:
    N, D = grid()
    loss = losses(N, D) * (1 + 0.005 * np.random.default_rng(3).normal(size=N.size))
    fitted = fit(Points.of(N, D, loss), resamples=100)
    asked = Points.of([1e8, 1e11], [1e9, 1e12], [1.0, 1.0])
    predicted, low, high = fitted.predict(asked)
    assert ((low <= predicted) & (predicted <= high)).all()
    assert (high - low)[1] / predicted[1] > 2 * (high - low)[0] / predicted[0]


def test_forks_of_one_trunk_are_drawn_together() -> None:
    """Their common luck is no evidence: intervals are wider than were they taken for independent runs."""
    random = np.random.default_rng(2)
    N, D = grid()
    trunk = np.repeat(random.normal(size=6), 5)
    loss = losses(N, D) * (1 + 0.005 * trunk)
    together = fit(Points.of(N, D, loss, group=[f"{n:.0f}" for n in N]), robust=False, resamples=100).interval("n*")
    apart = fit(Points.of(N, D, loss), robust=False, resamples=100).interval("n*")
    assert together.high - together.low > 1.3 * (apart.high - apart.low)


def covered(repeats: int, resamples: int) -> dict[str, int]:
    """How often the intervals of six sizes by five token counts, noise 0.5 %, hold the truth."""
    truth, hits = {"a": A, "b": B, "n*": B / (A + B)}, {"a": 0, "b": 0, "n*": 0}
    N, D = grid()
    for seed in range(repeats):
        loss = losses(N, D) * (1 + 0.005 * np.random.default_rng(seed).normal(size=N.size))
        groups = [f"{n:.0f}" for n in N]
        fitted = fit(Points.of(N, D, loss, group=groups), resamples=resamples)
        for name, true in truth.items():
            interval = fitted.interval(name)
            hits[name] += interval.low <= true <= interval.high
    return hits


def test_intervals_cover_in_a_few_repeats() -> None:
    """Of 12 intervals that hold the truth with 0.9, fewer than 7 do once in 2,000 times (binomial)."""
    assert covered(12, 100)["n*"] >= 7


@pytest.mark.slow
def test_intervals_cover_nine_times_in_ten() -> None:
    """Of 200 with 0.9 each: 180 with a standard deviation of 4.2; 164 to 196 leaves out one case in 500."""
    hits = covered(200, 300)
    print({name: f"{count} of 200" for name, count in hits.items()})
    assert 164 <= hits["n*"] <= 196
    assert min(hits["a"], hits["b"]) >= 140  # of a and b alone: fewer, which docs/scaling.md says


def test_the_forms_say_what_they_fit() -> None:
    assert [form.unknowns for form in (PLAIN, EFFECTIVE, LOGARITHM)] == [5, 6, 6]
    assert EFFECTIVE.names == ["E", "A", "B", "a", "b", "g"]
