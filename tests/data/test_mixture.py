"""A mixture reads each of its texts in that text's own order, as often as its weight says."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.loader import Loader
from data.mixture import Mixture, MixtureOrder, mix_datasets
from data.order import SampleOrder
from data.shards import TokenDataset

WEIGHTS = [0.5, 0.2, 0.3]


def order_of(weights: list[float]) -> MixtureOrder:
    exact = [Fraction(str(weight)) for weight in weights]
    shares = tuple(weight / sum(exact) for weight in exact)
    orders = tuple(SampleOrder(1000 + 10 * i, 8, seed=7) for i in range(len(weights)))
    return MixtureOrder(orders, tuple(2000 * i for i in range(len(weights))), shares)


@given(
    st.lists(st.sampled_from([1, 2, 0.7, 0.3, 1e-3, 12.5]), min_size=1, max_size=5),
    st.integers(0, 5000),
)
def test_shares_are_the_weights_to_some_samples_and_numbering_has_no_gaps(weights: list[float], number: int) -> None:
    part, index = order_of(weights).parts(np.arange(number))
    for i, weight in enumerate(weights):
        assert abs((part == i).sum() - number * weight / sum(weights)) <= (i + 1) / 2 + 1e-6
        assert index[part == i].tolist() == list(range((part == i).sum()))


def test_the_part_of_a_sample_depends_on_its_number_alone() -> None:
    order = order_of(WEIGHTS)
    part, index = order.parts(np.arange(1000))
    some = np.array([999, 3, 500, 4])
    assert [array.tolist() for array in order.parts(some)] == [part[some].tolist(), index[some].tolist()]
    far = 10**12
    part, _ = order.parts(np.arange(far, far + 1000))
    assert np.bincount(part).tolist() == [500, 200, 300]


def test_windows_are_those_of_each_text_alone() -> None:
    order = order_of(WEIGHTS)
    samples = np.arange(400)
    starts, (part, index) = order.starts(samples), order.parts(samples)
    for i, alone in enumerate(order.orders):
        assert (starts[part == i] - 2000 * i).tolist() == alone.starts(index[part == i]).tolist()
    assert order.since(samples).tolist() == starts.tolist()
    assert order.begins(3)


@pytest.fixture
def mixture(byte_dataset: Callable[..., TokenDataset]) -> Mixture:
    small = byte_dataset(b"a" * 100, b"b" * 57)
    large = byte_dataset(b"A" * 3000, b"B" * 20, b"C" * 41, b"D" * 33)
    return mix_datasets([small, large], [1, 3])


@pytest.mark.parametrize("documents", ["concatenate", "reset"])
def test_batches_on_any_world_hold_windows_of_one_text_each(mixture: Mixture, documents: str) -> None:
    how = {"seq_len": 16, "batch_sequences": 8, "seed": 3, "documents": documents}
    alone = Loader(mixture, micro_batch=8, **how)
    ranks = [Loader(mixture, micro_batch=2, rank=rank, world=2, **how) for rank in range(2)]
    small = 0
    for first in range(0, 80, 8):
        (whole,) = alone.step(first)
        parts = sorted((batch for rank in ranks for batch in rank.step(first)), key=lambda batch: batch.first_sample)
        assert whole.tokens.tolist() == [row for batch in parts for row in batch.tokens.tolist()]
        for row in whole.tokens.tolist():
            text = bytes(row)
            assert text.islower() or text.isupper()
            small += text.islower()
    assert small == 20


def test_ends_of_documents_are_those_of_each_text(mixture: Mixture) -> None:
    (batch,) = Loader(mixture, seq_len=64, batch_sequences=40, micro_batch=40, seed=0, documents="reset").step(0)
    assert batch.document_ends is not None
    for tokens, ends in zip(batch.tokens.tolist(), batch.document_ends.tolist()):
        for position, end in enumerate(ends):
            assert len(set(tokens[position:end])) == 1
            assert end >= len(tokens) or tokens[end] != tokens[position]


def test_the_numbers_of_a_mixture(mixture: Mixture) -> None:
    small, large = mixture.parts
    assert len(mixture.tokens) == len(small.tokens) + len(large.tokens)
    assert mixture.bytes == small.bytes + large.bytes
    assert mixture.bytes_per_token == 1
    assert mixture.document_starts.tolist() == [0, 100, 157, 3157, 3177, 3218, 3251]
    assert mixture.fingerprint != mix_datasets([small, large], [1, 2]).fingerprint
    assert mixture.fingerprint == mix_datasets([small, large], [0.25, 0.75]).fingerprint


def test_a_text_without_a_whole_window_is_refused(mixture: Mixture) -> None:
    with pytest.raises(ValueError, match=r"data\.seq_len: a window of 157 .* the training text has 157"):
        Loader(mixture, seq_len=157, batch_sequences=1, micro_batch=1, seed=0)
