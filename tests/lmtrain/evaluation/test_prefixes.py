"""The sample of prefixes: unbiased, with an honest standard error, over short and long prefixes."""

import itertools
import statistics
from typing import NamedTuple

import numpy as np
import pytest

from data.windows import Window, windows
from lmtrain.evaluation.prefixes import FEWEST, MOST, Sample, Shapes
from lmtrain.evaluation.result import Leak

PROTOCOLS = [(300, 300), (100, 100), (100, 7), (32, 32), (5, 1)]


class Batch(NamedTuple):
    """Windows of equal shape and the losses of their targets."""

    windows: list[Window]
    losses: np.ndarray


class Text:
    """One-pass losses of the targets of a text, and what each leaked: the more, the more tokens it saw."""

    def __init__(self, tokens: int, context: int, stride: int) -> None:
        generator = np.random.default_rng(3)
        self.windows = list(windows(tokens, context, stride))
        self.seen = np.zeros(tokens, dtype=int)
        for window in self.windows:
            for target in range(window.first_scored, window.end + 1):
                assert self.seen[target] == 0
                self.seen[target] = target - window.start
        self.one_pass = generator.exponential(1.0, tokens)
        self.gap = generator.exponential(0.1, tokens) * self.seen / context + generator.normal(0, 0.1, tokens)
        self.shapes = Shapes(self.windows)

    def sampled(self, prefixes: int | None, seed: int = 0, batch: int = 3) -> tuple[Sample, Leak]:
        """A sample of it and what it tells."""
        sample = Sample(self.shapes, self.shapes.allot(prefixes), seed)
        for _, alike in itertools.groupby(self.windows, lambda w: (w.end - w.start, w.end - w.first_scored)):
            group = list(alike)
            for some in (group[i : i + batch] for i in range(0, len(group), batch)):
                losses = np.stack([self.one_pass[w.first_scored : w.end + 1] for w in some])
                sample.add(Batch(some, losses))
        targets = [prefix.end for prefix in sample.prefixes]
        alone = self.one_pass[targets] + self.gap[targets]
        return sample, Leak(float(self.one_pass[1:].sum()), sample.leaks(alone))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shapes_count_targets_and_tokens_by_what_they_saw(protocol: tuple[int, int]) -> None:
    text = Text(1000, *protocol)
    edges = [0, 8, 16, 32, 64, 128, 256, 512]
    for stratum, (low, high) in enumerate(itertools.pairwise(edges)):
        of = text.seen[(text.seen > low) & (text.seen <= high)]
        assert (text.shapes.targets[stratum], text.shapes.seen[stratum]) == (len(of), of.sum())
    assert text.shapes.total == 999
    assert text.shapes.tokens == sum(w.end - w.start for w in text.windows)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_targets_are_the_truth(protocol: tuple[int, int]) -> None:
    text = Text(1000, *protocol)
    sample, leak = text.sampled(10**6)
    assert sorted(prefix.end for prefix in sample.prefixes) == list(range(1, 1000))
    assert all(p.end - p.start == text.seen[p.end] and p.first_scored == p.end for p in sample.prefixes)
    assert sample.losses == [text.one_pass[p.end] for p in sample.prefixes]
    assert leak.gap == pytest.approx(text.gap[1:].mean(), abs=1e-12)
    assert leak.standard_error == 0
    for position in leak.by_position:
        of = (text.seen > position.start) & (text.seen <= position.stop)
        assert position.one_pass_loss == pytest.approx(text.one_pass[of].mean(), abs=1e-12)
        assert position.gap == pytest.approx(text.gap[of].mean(), abs=1e-12)
        assert position.tokens == position.prefixes == of.sum()


@pytest.mark.parametrize("protocol", [(300, 300), (100, 7)])
def test_the_gap_is_unbiased_and_its_error_is_what_it_says(protocol: tuple[int, int]) -> None:
    text = Text(3000, *protocol)
    truth = text.gap[1:].mean()
    leaks = [text.sampled(150, seed)[1] for seed in range(400)]
    gaps, errors = (np.array([getattr(leak, name) for leak in leaks]) for name in ("gap", "standard_error"))
    assert abs(gaps.mean() - truth) < 4 * gaps.std() / 20
    assert errors.mean() == pytest.approx(gaps.std(), rel=0.12)
    covered = np.abs(gaps - truth) < 1.96 * errors
    assert 0.91 < covered.mean() < 0.985
    for index in range(len(leaks[0].by_position)):
        positions = [leak.by_position[index] for leak in leaks]
        of = (text.seen > positions[0].start) & (text.seen <= positions[0].stop)
        mean, spread = np.mean([p.gap for p in positions]), np.std([p.gap for p in positions])
        assert abs(mean - text.gap[of].mean()) < 4 * spread / 20 + 1e-12


def test_the_standard_error_by_hand() -> None:
    text = Text(1000, 32, 32)
    sample, leak = text.sampled(60)
    variance = 0.0
    for low, high in itertools.pairwise([0, 8, 16, 32]):
        gaps = [text.gap[p.end] for p in sample.prefixes if low < p.end - p.start <= high]
        size = int(((text.seen > low) & (text.seen <= high)).sum())
        assert 2 <= len(gaps) < size
        variance += (size / 999) ** 2 * statistics.variance(gaps) / len(gaps) * (1 - len(gaps) / size)
    assert leak.standard_error == pytest.approx(variance**0.5, rel=1e-12)


def test_short_prefixes_are_drawn_more_often_than_they_occur_and_none_is_forgotten() -> None:
    shapes = Shapes(windows(4096 * 60 + 1, 4096, 4096))
    drawn = shapes.allot(1000)
    strata = np.flatnonzero(shapes.targets)
    assert drawn.sum() == pytest.approx(1000, abs=5)
    assert len(strata) == 10
    assert (drawn[strata] >= 2).all()
    assert (np.diff(drawn[strata] / shapes.targets[strata]) < 0).sum() == 8  # the first two octaves are equally large
    assert drawn[strata[-1]] / drawn[strata[-3]] == pytest.approx(2, rel=0.05)  # four times as many targets


@pytest.mark.parametrize("asked", [1, 2, 5, 50, 998, 999, 10**9])
def test_no_more_than_there_are_and_a_spread_where_there_is_one(asked: int) -> None:
    shapes = Shapes(windows(1000, 600, 600))
    drawn = shapes.allot(asked)
    assert (drawn <= shapes.targets).all()
    assert (drawn >= np.minimum(2, shapes.targets)).all()
    assert drawn.sum() >= min(asked, 999) - 8
    assert np.isfinite(Text(1000, 600, 600).sampled(asked)[1].standard_error)


@pytest.mark.parametrize(("context", "fewest", "most"), [(32, MOST, MOST), (1024, 600, 1000), (65536, FEWEST, FEWEST)])
def test_unless_asked_as_many_as_cost_little(context: int, fewest: int, most: int) -> None:
    shapes = Shapes(windows(4 * 65536 + 1, context, context))
    assert fewest - 5 <= shapes.allot(None).sum() <= most + 5


def test_neighbours_in_order_have_equal_lengths() -> None:
    sample, _ = Text(1000, 100, 7).sampled(200)
    lengths = [sample.prefixes[i].end - sample.prefixes[i].start for i in sample.in_order()]
    assert lengths == sorted(lengths)
    assert sample.tokens == sum(lengths)
