"""Every example is what the task's definition says, checked token by token; draws are as likely as they should be."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from data.tasks import TASKS
from data.tasks.passkey import FILLER

NOT = -100
LEAST = 1e-6  # a test of draws fails by chance once in a million seeds, and the seed is fixed


@pytest.mark.parametrize(("length", "pairs", "vocab_size"), [(64, 4, 256), (17, 4, 10), (256, 16, 64), (8, 2, 6)])
def test_mqar(examples: Callable, length: int, pairs: int, vocab_size: int) -> None:
    for tokens, labels in examples("mqar", length, pairs=pairs, vocab_size=vocab_size):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocab_size // 2 for key in keys)
        assert all(vocab_size // 2 <= value < vocab_size for value in values)
        value_of = dict(zip(keys, values, strict=True))
        assert labels[: 2 * pairs] == [NOT] * (2 * pairs)
        asked = []
        for place in range(2 * pairs, length):
            if tokens[place] == 0:
                assert labels[place] == NOT
            else:
                assert place % 2 == 0
                assert labels[place] == value_of[tokens[place]]
                asked.append(tokens[place])
        assert sorted(asked) == sorted(keys)


def test_gaps_of_mqar_follow_the_power_law(examples: Callable) -> None:
    """Of one pair: the gap g = 1, 2, ... has a probability in proportion to g^(0.01 - 1)."""
    places = [tokens.index(tokens[0], 2) for tokens, _ in examples("mqar", 22, pairs=1, count=20_000)]
    weights = np.arange(1, 11) ** -0.99
    seen = np.bincount([(place - 2) // 2 for place in places], minlength=10)
    assert stats.chisquare(seen, 20_000 * weights / weights.sum()).pvalue > LEAST


def test_the_second_gap_is_drawn_from_those_left(examples: Callable) -> None:
    """Of two pairs and three gaps: the first gap by weight, the second by weight among the other two."""
    pairs = Counter()
    for tokens, _ in examples("mqar", 10, pairs=2, count=20_000):
        pairs[tuple((tokens.index(key, 4) - 4) // 2 for key in (tokens[0], tokens[2]))] += 1
    weight = np.arange(1, 4) ** -0.99
    orders = [(i, j) for i in range(3) for j in range(3) if i != j]
    likely = [weight[i] / weight.sum() * weight[j] / (weight.sum() - weight[i]) for i, j in orders]
    assert stats.chisquare([pairs[order] for order in orders], 20_000 * np.array(likely)).pvalue > LEAST


@pytest.mark.parametrize(("length", "gap"), [(64, 0), (65, 0), (64, 20), (63, 20), (4, 0)])
def test_induction(examples: Callable, length: int, gap: int) -> None:
    size = (length - gap) // 2
    for tokens, labels in examples("induction", length, gap=gap, vocab_size=8):
        text = tokens[:size]
        assert all(1 <= symbol < 8 for symbol in text)
        assert tokens == text + [0] * gap + text + [0] * (length - gap - 2 * size)
        expected = [NOT] * length
        for i in range(1, size):
            expected[size + gap + i - 1] = text[i]
        assert labels == expected


@pytest.mark.parametrize(("length", "symbols"), [(64, 8), (33, 16), (2, 1)])
def test_selective_copy(examples: Callable, length: int, symbols: int) -> None:
    for tokens, labels in examples("selective_copy", length, symbols=symbols, vocab_size=10):
        strewn = [token for token in tokens[: length - symbols] if token != 0]
        assert len(strewn) == symbols
        assert all(2 <= token < 10 for token in strewn)
        assert tokens[length - symbols :] == [1] * symbols
        assert labels == [NOT] * (length - symbols) + strewn


def test_symbols_to_copy_stand_anywhere_equally_often(examples: Callable) -> None:
    made = examples("selective_copy", 24, symbols=4, count=5_000)
    taken = sum(np.array(tokens[:20]) != 0 for tokens, _ in made)
    assert stats.chisquare(taken, np.full(20, 5_000 * 4 / 20)).pvalue > LEAST


@pytest.mark.parametrize(
    ("length", "digits", "depth"), [(128, 4, None), (300, 4, 0.5), (40, 2, 0), (41, 6, 1), (10, 4, None)]
)
def test_passkey(examples: Callable, length: int, digits: int, depth: float | None) -> None:
    for tokens, labels in examples("passkey", length, digits=digits, depth=depth):
        assert len(tokens) == len(labels) == length
        text = bytes(tokens) + bytes([labels[-1]])
        before, passkey, behind = text.split(b"#")
        assert len(passkey) == digits
        assert passkey.isdigit()
        hay, asked = behind[: -digits - 1], behind[-digits - 1 :]
        assert asked == b"?" + passkey
        assert before + hay in FILLER * (2 + length // len(FILLER))
        if depth is not None:
            assert abs(len(before) - depth * len(before + hay)) <= 0.5
        assert labels == [NOT] * (length - digits) + list(passkey)


def test_passkeys_stand_at_every_depth_equally_often(examples: Callable) -> None:
    places = [bytes(tokens).index(b"#") for tokens, _ in examples("passkey", 30, count=5_000)]
    seen = np.bincount(places)
    assert len(seen) == 30 - 2 * 4 - 2 + 1
    assert stats.chisquare(seen).pvalue > LEAST


def test_the_filler_holds_nothing_that_could_be_taken_for_a_passkey() -> None:
    assert FILLER.count(b".") == 4
    assert not set(FILLER) & set(b"0123456789#?")


@pytest.mark.parametrize("name", TASKS)
def test_the_least_length_is_the_one_that_the_settings_allow(examples: Callable, name: str) -> None:
    """Where there are no problems, examples are made; one token shorter there are some, in words."""
    task = TASKS[name]()
    least = next(length for length in range(1, 200) if not task.problems(length))
    examples(name, least)
    assert task.problems(least - 1)
    assert all(setting in TASKS[name].__dataclass_fields__ for setting, _ in task.problems(least - 1))


def test_more_pairs_than_keys_is_a_problem() -> None:
    assert not TASKS["mqar"](vocab_size=10, pairs=4).problems(100)
    assert TASKS["mqar"](vocab_size=10, pairs=5).problems(100)


def test_titles_tell_all_settings() -> None:
    assert TASKS["mqar"](vocab_size=64, pairs=4).title(128) == "mqar-v64-k4-t128"
    assert TASKS["passkey"]().title(64, 128) == "passkey-d4-t64+128"
    assert TASKS["passkey"](depth=0.5).title(64) == "passkey-d4-depth0.5-t64"
    marks = [[field.metadata["mark"] for field in task.__dataclass_fields__.values()] for task in TASKS.values()]
    assert all(len(set(of_one)) == len(of_one) for of_one in marks)
