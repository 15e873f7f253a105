"""Points 5 and 6: decoding is one pass in pieces; rows and packed documents do not see each other."""

from typing import Any

import pytest
import torch

from attention.mixer import Mixer
from tests.conformance.oracle import Subject
from tests.conformance.sequences import Packing, Tokens, largest_difference

LENGTH = 35
ROWS = Packing([[5, 12, 1, 17], [20, 15]])
FIELDS = [(), ("positions",), ("document_ends",), ("positions", "document_ends")]
CHUNKS = {"token by token": [1] * LENGTH, "ragged": [3, 1, 10, 2, 19], "at once": [LENGTH]}

by_fields = pytest.mark.parametrize("fields", FIELDS, ids=lambda f: " and ".join(f) or "unpacked")


@torch.no_grad()
def decode(mixer: Mixer, tokens: Tokens, chunks: list[int], *fields: str, limit: int | None = None) -> Any:
    """y of all tokens, given to a state in chunks, and the state."""
    state = mixer.init_state(tokens.x.shape[0], limit)
    parts, start = [], 0
    for chunk in chunks:
        part = tokens.part(start, start + chunk)
        parts.append(part.run(mixer, state, **ROWS.part(start, start + chunk, *fields)))
        start += chunk
    return torch.cat(parts, 1), state


@by_fields
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_decoding_equals_one_pass(subject: Subject, chunks: list[int], fields: tuple[str, ...]) -> None:
    if fields == ("document_ends",):
        # An end at the last of the new tokens means "it goes on": let no chunk end there.
        chunks = [3, 1, 10, 2, 19] if len(chunks) > 1 else chunks
    mixer = subject.mixer().eval()
    tokens = Tokens.random(2, LENGTH, subject.case.dim)
    expected = tokens.run(mixer, **ROWS.part(0, LENGTH, *fields))
    y, _ = decode(mixer, tokens, chunks, *fields)
    assert largest_difference(y, expected) < 1e-12


def test_decoding_far_beyond_what_lives(subject: Subject) -> None:
    """Long enough that dead keys are forgotten, again and again."""
    mixer = subject.mixer().eval()
    tokens = Tokens.random(2, 200, subject.case.dim)
    y, _ = decode(mixer, tokens, [1] * 120 + [7] * 5 + [45])
    with torch.no_grad():
        assert largest_difference(y, tokens.run(mixer)) < 1e-12 * y.abs().max()  # rounding goes with the size


def test_training_goes_on_from_a_state(subject: Subject) -> None:
    """Segments of a stream: gradients reach the new tokens, and what is stored holds no graph."""
    mixer = subject.mixer()
    tokens = Tokens.random(2, LENGTH, subject.case.dim)
    state = mixer.init_state(2)
    tokens.part(0, 10).run(mixer, state)
    last = tokens.part(10, LENGTH)
    last.vectors.requires_grad_()
    y = last.run(mixer, state)
    last.part(0, 3).run(mixer, state)
    y.square().sum().backward()
    assert last.vectors.grad is not None
    assert last.vectors.grad.abs().sum() > 0


def test_a_state_of_another_batch_is_refused(typical: Subject) -> None:
    mixer = typical.mixer().eval()
    for tokens in (Tokens.random(1, 3, typical.case.dim), Tokens.random(3, 3, typical.case.dim)):
        with pytest.raises(ValueError, match=f"the state was made for 2 sequences, got {len(tokens.x)}"):
            tokens.run(mixer, mixer.init_state(2))


def test_the_state_is_as_large_as_the_cost_says(subject: Subject) -> None:
    mixer = subject.mixer().eval()
    tokens = Tokens.random(1, 40, subject.case.dim)
    state = mixer.init_state(1)
    with torch.no_grad():
        for length in range(1, 41):
            tokens.part(length - 1, length).run(mixer, state)
            stated = mixer.cost(length).state_bytes
            assert state.bytes <= stated if subject.selects else state.bytes == stated, length
            assert state.bytes <= state.capacity


def test_a_limit_bounds_the_state(subject: Subject) -> None:
    """Whatever lives for ever lives for `limit` tokens; a limit beyond all tokens changes nothing."""
    mixer = subject.mixer().eval()
    tokens = Tokens.random(1, 112, subject.case.dim)
    state = mixer.init_state(1, 16)
    with torch.no_grad():
        held = []
        for t in range(112):
            tokens.part(t, t + 1).run(mixer, state)
            held.append(state.bytes)
    assert max(held[80:]) <= max(held[32:80])

    limited, _ = decode(mixer, Tokens.random(2, LENGTH, subject.case.dim), [1] * LENGTH, limit=LENGTH + 1)
    free, _ = decode(mixer, Tokens.random(2, LENGTH, subject.case.dim), [1] * LENGTH)
    assert torch.equal(limited, free)


@torch.no_grad()
def test_rows_do_not_see_each_other(subject: Subject) -> None:
    mixer = subject.mixer()
    tokens, other = (Tokens.random(2, LENGTH, subject.case.dim, seed=seed) for seed in (1, 2))
    mixed = Tokens(torch.cat([tokens.vectors[:, :1], 100.0 * other.vectors[:, 1:]], 1))
    y = tokens.run(mixer)
    assert largest_difference(mixed.run(mixer)[:1], y[:1]) <= subject.rounding
    assert largest_difference(tokens.row(1).run(mixer), y[1:]) < 1e-12


@by_fields
@torch.no_grad()
def test_a_packed_document_equals_the_document_alone(subject: Subject, fields: tuple[str, ...]) -> None:
    packing = ROWS if fields else Packing([[LENGTH], [LENGTH]])
    mixer = subject.mixer()
    tokens = Tokens.random(2, LENGTH, subject.case.dim)
    y = tokens.run(mixer, **packing.part(0, LENGTH, *fields))
    for row, start, stop in packing.spans():
        alone = tokens.row(row).part(start, stop).run(mixer)
        assert largest_difference(y[row : row + 1, start:stop], alone) < 1e-12, (row, start)


@torch.no_grad()
def test_position_zero_begins_a_document_in_a_state(subject: Subject) -> None:
    """The second row begins one amid the new tokens, the first goes on."""
    mixer = subject.mixer().eval()
    tokens = Tokens.random(2, LENGTH, subject.case.dim)
    state = mixer.init_state(2)
    tokens.part(0, 9).run(mixer, state)
    goes_on = torch.arange(9, LENGTH)
    positions = torch.stack([goes_on, torch.where(goes_on < 14, goes_on, goes_on - 14)])
    y = tokens.part(9, LENGTH).run(mixer, state, positions=positions)

    assert largest_difference(y[:1], tokens.row(0).run(mixer)[:, 9:]) < 1e-12
    assert largest_difference(y[1:, :5], tokens.row(1).part(0, 14).run(mixer)[:, 9:]) < 1e-12
    assert largest_difference(y[1:, 5:], tokens.row(1).part(14, LENGTH).run(mixer)) < 1e-12
