"""Draws are pure functions of their keys, and frozen: runs and held-out examples of old must stay what they were."""

import numpy as np

from data.tasks.draws import SPLITS, Draws, example_keys

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """SplitMix64's output function, in plain integers."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def key(seed: int, split: str, index: int) -> int:
    stream = mix(mix(seed + GOLDEN) + (SPLITS.index(split) + 1) * GOLDEN & MASK)
    return mix(stream + (index + 1) * GOLDEN & MASK)


def test_the_definition_in_plain_integers() -> None:
    for seed, split in ((0, "train"), (1337, "validation"), (2**40, "test")):
        keys = example_keys(seed, split, np.array([0, 1, 10**9]))
        assert keys.tolist() == [key(seed, split, index) for index in (0, 1, 10**9)]
    draws = Draws(keys)
    numbers = np.hstack([draws.uniform(3), draws.uniform(2)])
    for row, each in zip(numbers.tolist(), keys.tolist(), strict=True):
        assert row == [((mix(each + i * GOLDEN & MASK) >> 12) + 0.5) / 2**52 for i in range(1, 6)]


def test_no_row_depends_on_another() -> None:
    keys = example_keys(1, "train", np.arange(5))
    whole, part = Draws(keys), Draws(keys[2:4])
    for draw in (lambda d: d.below(100, 7), lambda d: d.distinct(9, 4), lambda d: d.weighted(np.arange(1.0, 6.0), 3)):
        assert (draw(whole)[2:4] == draw(part)).all()


def test_distinct_numbers_are_distinct_and_within_bounds() -> None:
    numbers = np.sort(Draws(example_keys(0, "test", np.arange(1000))).distinct(8, 8), axis=1)
    assert (numbers == np.arange(8)).all()
    below = Draws(example_keys(0, "test", np.arange(1000))).below(3, 20)
    assert (below.min(), below.max()) == (0, 2)


def test_keys_of_seeds_splits_and_indices_all_differ() -> None:
    keys = [example_keys(seed, split, np.arange(1000)) for seed in range(5) for split in SPLITS]
    assert len(np.unique(np.concatenate(keys))) == 15_000
