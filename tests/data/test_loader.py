"""What a step reads depends on the seed and the step alone; documents are told apart exactly."""

import threading
import zlib
from collections.abc import Callable
from itertools import count, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import load_corpus
from data.loader import UNSCORED, Batch, Loader, document_bounds
from data.order import read_ranges, readable
from data.shards import TokenDataset, prepare
from data.tokenizer import CharacterTokenizer

Dataset = Callable[..., TokenDataset]
TEXT = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))


def loader(dataset: TokenDataset, **changes) -> Loader:
    return Loader(dataset, **{"seq_len": 16, "batch_sequences": 12, "micro_batch": 2, "seed": 3, **changes})


def rows(batches: list[Batch]) -> dict[int, bytes]:
    """Global sample index -> tokens and last label."""
    return {
        batch.first_sample + j: bytes(batch.tokens[j].tolist() + batch.labels[j, -1:].tolist())
        for batch in batches
        for j in range(len(batch.tokens))
    }


def rows_in(batch: Batch) -> list[bytes]:
    """Tokens and last label of each row."""
    return [bytes([*tokens.tolist(), labels[-1].item()]) for tokens, labels in zip(batch.tokens, batch.labels)]


def test_a_batch_is_windows_of_the_text_with_the_next_tokens_as_labels(byte_dataset: Dataset) -> None:
    source = loader(byte_dataset(TEXT))
    step = source.step(0)
    assert [batch.first_sample for batch in step] == [0, 2, 4, 6, 8, 10]
    for batch in step:
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.tokens.shape == batch.labels.shape == (2, 16)
        assert batch.tokens.is_contiguous()
        assert batch.labels.is_contiguous()
        assert batch.positions is None
        assert batch.document_ends is None
        starts = source.order.starts(np.arange(batch.first_sample, batch.first_sample + 2))
        for row, start in enumerate(starts):
            assert bytes(batch.tokens[row].tolist()) == TEXT[start : start + 16]
            assert bytes(batch.labels[row].tolist()) == TEXT[start + 1 : start + 17]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_a_step_reads_the_same_samples_on_any_world(byte_dataset: Dataset, world: int, micro_batch: int) -> None:
    dataset = byte_dataset(TEXT)
    expected = loader(dataset).step(24)
    ranks = [loader(dataset, world=world, rank=r, micro_batch=micro_batch).step(24) for r in range(world)]
    together = [batch for step in ranks for batch in step]
    assert rows(together) == rows(expected)
    assert sorted(rows(together)) == list(range(24, 36))
    assert sum(batch.crc for batch in together) % 2**32 == sum(batch.crc for batch in expected) % 2**32


def test_rows_are_shared_out_as_the_definition_says(byte_dataset: Dataset) -> None:
    step = loader(byte_dataset(TEXT), world=3, rank=1, micro_batch=2).step(120)
    assert [batch.first_sample for batch in step] == [120 + 0 + 2, 120 + 6 + 2]


def test_the_crc_is_of_the_ids_whatever_their_type(byte_dataset: Dataset, tmp_path) -> None:
    batch = loader(byte_dataset(TEXT)).step(0)[0]
    expected = 0
    for tokens, labels in zip(batch.tokens, batch.labels):
        ids = [*tokens.tolist(), labels[-1].item()]
        expected += zlib.crc32(b"".join(id.to_bytes(4, "little") for id in ids))
    assert batch.crc == expected % 2**32
    plain = bytes(range(97, 123)) * 30
    (tmp_path / "plain.txt").write_bytes(plain)
    corpus = load_corpus("text", str(tmp_path / "plain.txt"))
    wide = CharacterTokenizer("".join(map(chr, range(300))))  # ids of two bytes, the same numbers
    (tmp_path / "texts" / "0000.txt").unlink()
    two_bytes = loader(prepare(corpus, "all", wide)).step(0)[0]
    assert two_bytes.crc == loader(byte_dataset(plain)).step(0)[0].crc


def test_steps_follow_one_another_and_a_cursor_resumes(byte_dataset: Dataset) -> None:
    source = loader(byte_dataset(TEXT))
    steps = list(islice(source.batches(0), 60))  # 311 windows in an epoch: two borders are crossed
    for index, step in enumerate(steps):
        assert rows(step) == rows(source.step(12 * index))
    resumed = list(islice(source.batches(12 * 40), 20))
    assert [rows(step) for step in resumed] == [rows(step) for step in steps[40:]]


def test_the_batch_size_may_change_between_runs(byte_dataset: Dataset) -> None:
    dataset = byte_dataset(TEXT)
    small, large = loader(dataset, batch_sequences=6), loader(dataset, batch_sequences=18)
    assert rows(large.step(30)) == rows(small.step(30)) | rows(small.step(36)) | rows(small.step(42))


SKIP = ((5, 30), (41, 42), (60, 85), (70, 100))


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 12), (2, 3), (3, 2), (4, 1)])
def test_skipped_samples_are_never_read_and_the_order_is_kept(
    byte_dataset: Dataset, world: int, micro_batch: int
) -> None:
    dataset = byte_dataset(TEXT)
    left = [sample for sample in range(300) if not any(first <= sample < last for first, last in SKIP)]
    every = {sample: row for step in range(25) for sample, row in rows(loader(dataset).step(12 * step)).items()}
    cursor, sources = (
        0,
        [loader(dataset, skip=SKIP, world=world, rank=r, micro_batch=micro_batch) for r in range(world)],
    )
    for step in range(12):
        read = [row for source in sources for batch in source.step(cursor) for row in rows_in(batch)]
        expected = left[12 * step : 12 * (step + 1)]
        assert sorted(read) == sorted(every[sample] for sample in expected)
        assert {source.after(cursor) for source in sources} == {expected[-1] + 1}
        cursor = expected[-1] + 1


def test_a_cursor_resumes_among_skipped_samples(byte_dataset: Dataset) -> None:
    source = loader(byte_dataset(TEXT), skip=SKIP)
    steps = list(islice(source.batches(0), 10))
    cursor = 0
    for index, step in enumerate(steps):
        assert [rows_in(batch) for batch in step] == [rows_in(batch) for batch in source.step(cursor)]
        resumed = next(loader(source.dataset, skip=SKIP).batches(cursor))
        assert [rows_in(batch) for batch in resumed] == [rows_in(batch) for batch in steps[index]]
        cursor = source.after(cursor)


def test_samples_skipped_in_the_past_change_nothing(byte_dataset: Dataset) -> None:
    dataset = byte_dataset(TEXT)
    assert rows(loader(dataset, skip=((0, 50),)).step(60)) == rows(loader(dataset).step(60))


@given(st.integers(0, 40), st.integers(1, 30), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=5))
def test_readable_samples_are_their_definition(first: int, number: int, pieces: list[tuple[int, int]]) -> None:
    skip = tuple(sorted((start, start + size) for start, size in pieces))
    left = (sample for sample in count(first) if not any(start <= sample < stop for start, stop in skip))
    assert readable(first, number, skip).tolist() == list(islice(left, number))


def test_ranges_are_read_from_text() -> None:
    assert read_ranges(None) == ()
    assert read_ranges("50:60, 1:3") == ((1, 3), (50, 60))
    for wrong in ("3:3", "5:4", "7", "a:b", "1:2,", "-1:3", "1:2:3", f"1:{10**30}", "²:³"):
        with pytest.raises(ValueError, match=r"data\.skip: .* must be two samples first:last, first < last"):
            read_ranges(wrong)


def test_reset_by_hand(byte_dataset: Dataset) -> None:
    """One window of 8 over documents of 3, 2 and 4 bytes."""
    (batch,) = loader(byte_dataset(b"abc", b"de", b"fghi"), seq_len=8, batch_sequences=1, micro_batch=1,
                      documents="reset").step(0)  # fmt: skip
    assert bytes(batch.tokens[0].tolist()) == b"abcdefgh"
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.document_ends.tolist() == [[3, 3, 3, 5, 5, 9, 9, 9]]
    labels = [ord(c) for c in "bc"] + [UNSCORED, ord("e"), UNSCORED] + [ord(c) for c in "ghi"]
    assert batch.labels.tolist() == [labels]


def test_concatenated_and_reset_differ_in_labels_at_document_ends_alone(byte_dataset: Dataset) -> None:
    dataset = byte_dataset(*(TEXT[i : i + 7] for i in range(0, 700, 7)))
    plain, reset = loader(dataset), loader(dataset, documents="reset")
    for one, other in zip(plain.step(0), reset.step(0)):
        assert torch.equal(one.tokens, other.tokens)
        assert one.crc == other.crc
        scored = other.labels != UNSCORED
        assert torch.equal(one.labels[scored], other.labels[scored])
        last = other.document_ends == torch.arange(1, 17)
        assert torch.equal(~scored, last)
        assert last.any()


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 15), st.data())
def test_document_bounds_are_their_definition(lengths: list[int], seq_len: int, draw: st.DataObject) -> None:
    starts = np.cumsum([0, *lengths])
    row_starts = np.array(
        draw.draw(st.lists(st.integers(0, max(0, int(starts[-1]) - seq_len)), min_size=1, max_size=3))
    )
    seq_len = min(seq_len, int(starts[-1]))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    positions, ends = document_bounds(starts, row_starts, seq_len)
    assert positions.shape == ends.shape == (len(row_starts), seq_len)
    for row, start in enumerate(row_starts):
        for t in range(seq_len):
            document = owner[start + t]
            first = next(i for i in range(seq_len) if owner[start + i] == document)
            assert positions[row, t] == t - first
            assert ends[row, t] == starts[document + 1] - start


def test_breaking_off_ends_the_thread(byte_dataset: Dataset) -> None:
    before = threading.active_count()
    for _ in loader(byte_dataset(TEXT)).batches(0):
        assert threading.active_count() == before + 1
        break
    assert threading.active_count() == before


def test_an_exception_while_reading_surfaces(byte_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    source = loader(byte_dataset(TEXT))
    step = source.step

    def fail_later(first_sample: int) -> list[Batch]:
        if first_sample == 24:
            raise OSError("stale file handle")
        return step(first_sample)

    monkeypatch.setattr(source, "step", fail_later)
    batches = source.batches(0)
    assert rows(next(batches)) == rows(step(0))
    assert rows(next(batches)) == rows(step(12))
    with pytest.raises(OSError, match="stale file handle"):
        next(batches)


def test_settings_that_do_not_fit_are_refused(byte_dataset: Dataset) -> None:
    dataset = byte_dataset(b"only sixteen byt")
    with pytest.raises(ValueError, match=r"data\.seq_len: a window of 16 .* 17 tokens, but the training text has 16"):
        loader(dataset)
    with pytest.raises(ValueError, match=r"train\.micro_batch: 12 sequences .* micro-batches of 5 on 1 data ranks"):
        loader(dataset, seq_len=8, micro_batch=5)
    with pytest.raises(ValueError, match="micro-batches of 2 on 4 data ranks"):
        loader(dataset, seq_len=8, world=4)
    with pytest.raises(ValueError, match=r"data\.skip: the rows of data\.stream read on"):
        loader(dataset, seq_len=1, micro_batch=1, batch_sequences=1, skip=((0, 1),), stream=True)
    with pytest.raises(ValueError, match=r"data\.documents: must be concatenate or reset, not 'isolate'"):
        loader(dataset, seq_len=8, documents="isolate")


def test_the_shortest_text_gives_its_one_window_for_ever(byte_dataset: Dataset) -> None:
    source = loader(byte_dataset(b"exactly 17 bytes."), batch_sequences=2)
    for (batch,) in islice(source.batches(0), 3):
        assert [bytes(row.tolist()) for row in batch.tokens] == [b"exactly 17 bytes"] * 2
        assert batch.labels[:, -1].tolist() == [ord(".")] * 2


def test_rows_of_a_stream_read_on_and_know_their_documents(byte_dataset: Dataset) -> None:
    """Two lanes of 12 bytes over documents of 7, 10 and 7: positions go on from what a row has read."""
    text = b"abcdefg", b"hijklmnopq", b"rstuvwx"
    source = loader(byte_dataset(*text), seq_len=5, batch_sequences=2, micro_batch=2, documents="reset", stream=True)
    (first,), (second,), (again,) = source.step(0), source.step(2), source.step(4)
    assert [first.begins, second.begins, again.begins] == [True, False, True]
    assert [bytes(row) for row in first.tokens.tolist()] == [b"abcde", b"mnopq"]
    assert [bytes(row) for row in second.tokens.tolist()] == [b"fghij", b"rstuv"]
    assert first.positions.tolist() == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]  # m is not the document's first, but the row's
    assert second.positions.tolist() == [[5, 6, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert second.document_ends.tolist() == [[2, 2, 12, 12, 12], [7, 7, 7, 7, 7]]
    assert second.labels[0].tolist() == [ord("g"), UNSCORED, ord("i"), ord("j"), ord("k")]
    assert first.labels[1].tolist() == [*b"nopq", UNSCORED]
