"""What a step reads depends on the seed and the step alone; documents are told apart exactly."""

import threading
import zlib
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import load_corpus
from data.loader import UNSCORED, Batch, Loader, document_bounds
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
