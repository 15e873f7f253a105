"""Splits and batches of a task: the same on any world, resumed exactly, and never of what is held out."""

from itertools import islice

import pytest
import torch

from data.loader import Batch
from data.tasks import TASKS, TaskDataset, TaskLoader
from data.tokenizer import from_json

TASK = TASKS["mqar"](vocab_size=64, pairs=4)
TRAIN = TaskDataset(TASK, "train", 32, seed=3)


def loader(**changes) -> TaskLoader:
    return TaskLoader(TRAIN, **{"batch_sequences": 12, "micro_batch": 2, **changes})


def rows(batches: list[Batch]) -> dict[int, tuple[list[int], list[int]]]:
    """Global sample index -> tokens and labels."""
    return {
        batch.first_sample + j: (batch.tokens[j].tolist(), batch.labels[j].tolist())
        for batch in batches
        for j in range(len(batch.tokens))
    }


def test_a_batch_holds_the_examples_of_its_samples() -> None:
    for batch in loader().step(24):
        expected = TRAIN.examples(batch.first_sample, 2)
        assert batch.tokens.tolist() == expected.tokens.tolist()
        assert batch.labels.tolist() == expected.labels.tolist()
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert (batch.positions, batch.document_ends, batch.begins) == (None, None, True)


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 12), (2, 3), (3, 4), (12, 1)])
def test_a_step_reads_the_same_samples_on_any_world(world: int, micro_batch: int) -> None:
    ranks = [loader(world=world, rank=rank, micro_batch=micro_batch).step(24) for rank in range(world)]
    together = [batch for step in ranks for batch in step]
    assert rows(together) == rows(loader().step(24))
    assert sum(batch.crc for batch in together) % 2**32 == sum(batch.crc for batch in loader().step(24)) % 2**32


def test_a_cursor_resumes() -> None:
    steps = [rows(step) for step in islice(loader().batches(0), 10)]
    assert steps == [rows(loader().step(12 * index)) for index in range(10)]
    assert [rows(step) for step in islice(loader().batches(72), 4)] == steps[6:]


def test_no_example_comes_twice_or_is_held_out() -> None:
    """Of examples with 31!/27! x 32!/28! pairs and more than a million orders of queries."""
    sets = [TRAIN, TaskDataset(TASK, "train", 32, seed=4), TaskDataset(TASK, "validation", 32)]
    sets.append(TaskDataset(TASK, "test", 32))
    seen = [tuple(row) for each in sets for row in each.examples(0, 2000).tokens.tolist()]
    assert len(set(seen)) == 8000


def test_the_crc_depends_on_tokens_and_labels() -> None:
    other = TaskLoader(TaskDataset(TASK, "train", 32, seed=4), batch_sequences=2, micro_batch=2)
    assert other.step(0)[0].crc != loader(batch_sequences=2).step(0)[0].crc


def test_fingerprints_tell_datasets_apart() -> None:
    sets = [
        TRAIN,
        TaskDataset(TASK, "train", 34),
        TaskDataset(TASKS["mqar"](vocab_size=64, pairs=5), "train", 32),
        TaskDataset(TASKS["induction"](vocab_size=64), "train", 32),
        TaskDataset(TASK, "validation", 32),
        TaskDataset(TASK, "test", 32),
    ]
    assert len({each.fingerprint for each in sets}) == len(sets)
    assert TaskDataset(TASK, "train", 32, seed=4).fingerprint == TRAIN.fingerprint  # a fork may have another seed


def test_unknown_splits_and_impossible_lengths_are_named() -> None:
    with pytest.raises(ValueError, match=r"mqar has no split 'all'; it has train, validation, test"):
        TaskDataset(TASK, "all", 32)
    with pytest.raises(ValueError, match=r"15 tokens holds at most 3 pairs"):
        TaskDataset(TASK, "test", 15)


@pytest.mark.parametrize("name", TASKS)
def test_people_can_write_the_tokens(name: str) -> None:
    task = TASKS[name]()
    ids = TaskDataset(task, "test", 64).examples(0, 1).tokens[0]
    text = task.tokenizer.decode(ids)
    again = from_json(task.tokenizer.to_json())
    assert again.encode(text).tolist() == ids.tolist()
    assert task.tokenizer.token_bytes[ids].sum() == len(text)
    assert ids.max() < task.vocab_size == task.tokenizer.vocab_size
