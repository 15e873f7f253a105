"""The order of samples is frozen, uniform, and the same however it is asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import SampleOrder, StreamOrder, permute

TWO_64 = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % TWO_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % TWO_64
    return value ^ (value >> 31)


def start_of_sample(num_tokens: int, seq_len: int, seed: int, sample: int) -> int:
    """The definition, one sample at a time, in Python's integers."""
    n = max(1, (num_tokens - seq_len) // seq_len)
    epoch, index = divmod(sample, n)
    key = mix((mix((seed + GOLDEN) % TWO_64) + (epoch + 1) * GOLDEN) % TWO_64)
    half = 1
    while 4**half < n:
        half += 1
    while True:
        left, right = divmod(index, 2**half)
        for i in range(1, 7):
            left, right = right, left ^ mix(mix((key + i * GOLDEN) % TWO_64) ^ right) % 2**half
        index = left * 2**half + right
        if index < n:
            break
    offset = mix(key) % seq_len if num_tokens >= 2 * seq_len else 0
    return offset + index * seq_len


@given(
    st.integers(1, 50),
    st.integers(0, 2000),
    st.one_of(st.integers(-3, 3), st.integers(-(2**70), 2**70)),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
)
def test_it_is_its_definition(seq_len: int, more: int, seed: int, samples: list[int]) -> None:
    num_tokens = seq_len + 1 + more
    expected = [start_of_sample(num_tokens, seq_len, seed, sample) for sample in samples]
    assert SampleOrder(num_tokens, seq_len, seed).starts(np.array(samples)).tolist() == expected


def test_it_is_frozen() -> None:
    """A change here changes what every run with a given seed reads."""
    starts = SampleOrder(num_tokens=1_003_854, seq_len=64, seed=1337).starts
    assert starts(np.arange(6)).tolist() == [879414, 184438, 557878, 304054, 315254, 391542]
    assert starts(np.arange(15_682, 15_686)).tolist() == [691510, 12790, 773164, 5676]
    assert SampleOrder(11 * 5 + 1, 5, seed=0).starts(np.arange(20)).tolist() == [
        48,
        13,
        8,
        3,
        23,
        33,
        43,
        18,
        28,
        38,
        2,
        12,
        42,
        7,
        32,
        17,
        27,
        37,
        22,
        47,
    ]
    assert SampleOrder(10**12, 2**16, seed=-1).starts(np.array([0, 10**9])).tolist() == [
        806424567338,
        405064836406,
    ]


@given(st.integers(1, 20), st.integers(0, 400), st.integers(0, 2**64), st.integers(0, 5))
def test_every_epoch_reads_each_of_its_windows_once(seq_len: int, more: int, seed: int, epoch: int) -> None:
    order = SampleOrder(seq_len + 1 + more, seq_len, seed)
    n = order.windows_per_epoch
    starts = np.sort(order.starts(np.arange(epoch * n, (epoch + 1) * n)))
    offset = starts[0]
    assert starts.tolist() == [offset + i * seq_len for i in range(n)]
    assert 0 <= offset < seq_len
    assert starts[-1] + seq_len + 1 <= order.num_tokens


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    images = permute(np.arange(size, dtype=np.uint64), size, np.full(size, key, dtype=np.uint64))
    assert sorted(images.tolist()) == list(range(size))


def feistel_orders_of_four() -> dict[tuple[int, ...], float]:
    """The chance of each order of 0..3 after six rounds, if each draws its function of one bit at random."""
    likely = {(0, 1, 2, 3): 1.0}
    for _ in range(6):
        after: dict[tuple[int, ...], float] = {}
        for order, probability in likely.items():
            for function in itertools.product((0, 1), repeat=2):
                image = tuple((v & 1) << 1 | (v >> 1) ^ function[v & 1] for v in order)
                after[image] = after.get(image, 0) + probability / 4
        likely = after
    return likely


def test_all_orders_of_four_windows_are_as_likely_as_six_rounds_can_make_them() -> None:
    expected = feistel_orders_of_four()
    assert len(expected) == 24
    assert max(abs(24 * probability - 1) for probability in expected.values()) == 1 / 16
    epochs = 1000
    counts = dict.fromkeys(expected, 0)
    for seed in range(24):
        starts = SampleOrder(5 * 100, 100, seed).starts(np.arange(4 * epochs)).reshape(epochs, 4)
        for row in (starts // 100).tolist():
            counts[tuple(row)] += 1
    chi_square = sum((counts[order] - 24 * epochs * p) ** 2 / (24 * epochs * p) for order, p in expected.items())
    assert abs(chi_square - 23) < 4 * np.sqrt(2 * 23)  # 23 degrees of freedom: mean 23, variance 46


def test_every_window_comes_at_every_time_equally_often() -> None:
    """Over 3,000 epochs of 23 windows, a size that walks the cycle often (of 64)."""
    n, epochs = 23, 3000
    windows = SampleOrder((n + 1) * 10, 10, seed=7).starts(np.arange(n * epochs)).reshape(epochs, n) // 10
    counts = np.array([np.bincount(windows[:, time], minlength=n) for time in range(n)])
    expected = epochs / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = (n - 1) ** 2
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)


def test_neighbours_in_time_are_no_neighbours_in_text() -> None:
    starts = SampleOrder(100_001 * 4, 4, seed=3).starts(np.arange(100_000)) // 4
    steps = np.abs(np.diff(starts)) / 100_000
    assert abs(steps.mean() - 1 / 3) < 0.005  # the mean distance of two random points; its standard error is 0.0007
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 0.015


def test_offsets_differ_between_epochs_and_cover_the_window() -> None:
    order = SampleOrder(64 * 11, 64, seed=5)
    offsets = order.starts(np.arange(0, 10 * 4000, 10)) % 64
    counts = np.bincount(offsets, minlength=64)
    assert abs(((counts - 62.5) ** 2 / 62.5).sum() - 63) < 4 * np.sqrt(2 * 63)


def test_seeds_give_different_orders() -> None:
    orders = {tuple(SampleOrder(10_000, 10, seed).starts(np.arange(20)).tolist()) for seed in range(-50, 50)}
    assert len(orders) == 100


@given(st.integers(0, 10**9), st.integers(1, 50))
def test_a_sample_does_not_depend_on_what_is_asked_with_it(first: int, count: int) -> None:
    order = SampleOrder(12_345, 100, seed=11)
    together = order.starts(np.arange(first, first + count))
    one_by_one = [order.starts(np.array([sample]))[0] for sample in range(first, first + count)]
    assert together.tolist() == one_by_one


@pytest.mark.parametrize(("num_tokens", "windows"), [(9, 1), (15, 1), (16, 1), (23, 1), (24, 2), (32, 3)])
def test_the_number_of_windows(num_tokens: int, windows: int) -> None:
    order = SampleOrder(num_tokens, 8, seed=0)
    assert order.windows_per_epoch == windows
    starts = order.starts(np.arange(200))
    assert starts.min() >= 0
    assert starts.max() + 9 <= num_tokens


@pytest.mark.fault(14)
def test_text_shorter_than_a_window_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"data\.seq_len: a window of 8 .* 9 tokens, but the training text has 8"):
        SampleOrder(8, 8, seed=0)
    with pytest.raises(ValueError, match=r"data\.seq_len: must be at least 1, not 0"):
        SampleOrder(8, 0, seed=0)


@given(st.integers(1, 400), st.integers(1, 20), st.integers(1, 7))
def test_rows_of_a_stream_go_on_where_they_stopped(num_tokens: int, seq_len: int, rows: int) -> None:
    lane = num_tokens // rows
    if lane < seq_len + 1:
        with pytest.raises(ValueError, match=r"data\.stream"):
            StreamOrder(num_tokens, seq_len, rows)
        return
    order = StreamOrder(num_tokens, seq_len, rows)
    for step in range(2 * order.segments):
        samples = np.arange(step * rows, (step + 1) * rows)
        starts, since = order.starts(samples), order.since(samples)
        assert since.tolist() == [lane * row for row in range(rows)]
        if step % order.segments == 0:
            assert order.begins(step * rows)
            assert starts.tolist() == since.tolist()
        else:
            assert not order.begins(step * rows)
            assert (starts == order.starts(samples - rows) + seq_len).all()
        assert (starts + seq_len < num_tokens).all(), "the last target is a token of the text"
        assert (starts + seq_len <= since + lane).all()
    unread = lane - order.segments * seq_len
    assert 1 <= unread <= seq_len, "a lane is read as far as whole segments and their targets go"
