"""Streaming top-k against its definition: at each time sort the prefix of the document, and keep the best."""

import heapq
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.lifetimes import FOREVER
from attention.ops.select import listed, streaming_top_k

# Few values, so that most tie; and what is no ordinary number.
SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, math.inf, -math.inf, math.nan, 1e-45])


@st.composite
def streams(draw: Any) -> dict[str, Any]:
    """Two lists of scores, the lengths of their documents, and the settings."""
    documents = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    number = sum(documents)
    include_first = draw(st.booleans())
    return {
        "score": torch.tensor([draw(st.lists(SCORES, min_size=number, max_size=number)) for _ in range(2)]),
        "documents": documents,
        "keep": draw(st.integers(1 + include_first, 8)),
        "include_first": include_first,
    }


def worth(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def alive_by_definition(scores: list[float], keep: int, include_first: bool) -> list[set[int]]:
    """Of one document, who is alive at each time."""
    sets = []
    for t in range(len(scores)):
        forced = {0} if include_first else set()
        others = sorted(set(range(t + 1)) - forced, key=lambda j: (worth(scores[j]), j), reverse=True)
        sets.append(forced | set(others[: keep - len(forced)]))
    return sets


def deaths_by_definition(scores: list[float], keep: int, include_first: bool, begin: int) -> list[int]:
    """Of one document that begins at time `begin`."""
    sets = alive_by_definition(scores, keep, include_first)
    gone = [[t for t in range(j, len(scores)) if j not in sets[t]] for j in range(len(scores))]
    assert all(times == list(range(times[0], len(scores))) for times in gone if times), "somebody returned"
    return [begin + times[0] if times else FOREVER for times in gone]


def of_documents(stream: dict[str, Any]) -> list[list[int]]:
    """Deaths of each list."""
    rows = []
    for scores in stream["score"].tolist():
        deaths, begin = [], 0
        for length in stream["documents"]:
            part = scores[begin : begin + length]
            deaths += deaths_by_definition(part, stream["keep"], stream["include_first"], begin)
            begin += length
        rows.append(deaths)
    return rows


def starts(documents: list[int]) -> Tensor:
    """[T]: when each token's document began."""
    return torch.tensor([sum(documents[:i]) for i, length in enumerate(documents) for _ in range(length)])


@given(streams(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=300, deadline=None)
def test_it_is_its_definition(stream: dict[str, Any], dtype: torch.dtype) -> None:
    chosen = {"include_first": stream["include_first"], "start": starts(stream["documents"])}
    death = streaming_top_k(stream["score"].to(dtype)[None], stream["keep"], **chosen)
    assert death.dtype == torch.int64
    assert death[0].tolist() == of_documents(stream)


@given(streams())
@settings(max_examples=100, deadline=None)
def test_one_document_needs_no_start(stream: dict[str, Any]) -> None:
    stream["documents"] = [sum(stream["documents"])]
    death = streaming_top_k(stream["score"][None], stream["keep"], include_first=stream["include_first"])
    assert death[0].tolist() == of_documents(stream)


@given(streams(), st.data())
@settings(max_examples=200, deadline=None)
def test_the_living_are_all_that_matters(stream: dict[str, Any], data: st.DataObject) -> None:
    """In pieces, each given only who is alive of the earlier ones, and padding in between: the same deaths."""
    score, start = stream["score"].double(), starts(stream["documents"])
    number = score.shape[-1]
    cuts = sorted(data.draw(st.sets(st.integers(0, number), max_size=4)) | {0, number})
    expected = of_documents(stream)
    for row in range(2):
        held: list[int] = []
        for begin, end in itertools.pairwise(cuts):
            tokens = held + list(range(begin, end))
            place = data.draw(st.permutations(range(len(tokens) + 3)))[:3]  # of padding
            rows = list(tokens)
            for p in sorted(place):
                rows.insert(p, -1)
            padding = torch.tensor(rows) < 0
            death = streaming_top_k(
                torch.where(padding, 7.0, score[row, rows])[None, None],
                stream["keep"],
                start=torch.where(padding, 3, start[rows]),
                time=torch.where(padding, FOREVER, torch.tensor(rows)),
                include_first=stream["include_first"],
            )[0, 0]
            found = dict(zip(rows, death.tolist()))
            for token in tokens:
                assert found[token] == (expected[row][token] if expected[row][token] < end else FOREVER)
            held = [token for token in tokens if found[token] == FOREVER]


@pytest.mark.parametrize("keep", [1, 3, 40, 256, 8192])
def test_against_a_heap(keep: int) -> None:
    """Thousands of tokens, over all levels of the search; a heap holds the best so far, as pairs (score, time)."""
    torch.manual_seed(keep)
    score = torch.randn(1, 2, 5000)
    score[0, 1] = (8 * score[0, 1]).round()  # few values
    death = streaming_top_k(score, keep)
    for head in range(2):
        expected, heap = [FOREVER] * 5000, []
        for t, value in enumerate(score[0, head].tolist()):
            if len(heap) < keep:
                heapq.heappush(heap, (value, t))
            else:
                _, out = heapq.heappushpop(heap, (value, t))
                expected[out] = t
        assert death[0, head].tolist() == expected


def test_as_many_live_as_are_kept() -> None:
    death = streaming_top_k(torch.randn(2, 3, 70), 9)
    time = torch.arange(70)
    alive = (time[:, None] >= time) & (time[:, None] < death[..., None, :])
    assert torch.equal(alive.sum(-1), (time + 1).clamp(max=9).expand(2, 3, -1))


def test_of_equals_the_newest_wins() -> None:
    """Equal scores make a window; the first token stays beside a shorter one."""
    same = torch.zeros(1, 1, 10)
    never = [FOREVER] * 10
    assert streaming_top_k(same, 4)[0, 0].tolist() == [4, 5, 6, 7, 8, 9, *never[:4]]
    first = streaming_top_k(same, 4, include_first=True)[0, 0].tolist()
    assert first == [FOREVER, 4, 5, 6, 7, 8, 9, *never[:3]]


def test_the_future_decides_no_death_before_it() -> None:
    score = torch.randn(1, 4, 60)
    death = streaming_top_k(score, 5)
    for cut in range(1, 60):
        changed = torch.cat([score[..., :cut], 9 * torch.randn(1, 4, 60 - cut)], -1)
        other = streaming_top_k(changed, 5)
        assert torch.equal(other[..., :cut].clamp(max=cut), death[..., :cut].clamp(max=cut))


def test_documents_differ_by_row() -> None:
    score = torch.randn(2, 3, 20)
    start = torch.tensor([[0] * 20, [0] * 7 + [7] * 13])[:, None]
    death = streaming_top_k(score, 3, start=start)
    assert torch.equal(death[:1], streaming_top_k(score[:1], 3))
    assert torch.equal(death[1:, :, :7], streaming_top_k(score[1:, :, :7], 3))
    alone = streaming_top_k(score[1:, :, 7:], 3)
    assert torch.equal(death[1:, :, 7:], torch.where(alone == FOREVER, alone, alone + 7))


def test_it_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    score, start = torch.randn(1, 2, 30), torch.zeros(30, dtype=torch.int64)
    for name in ("__bool__", "item", "tolist", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, lambda self: pytest.fail("the selection reads from the device"))
    streaming_top_k(score, 3, start=start, include_first=True)


@pytest.mark.parametrize(("keep", "include_first"), [(0, False), (1, True)])
def test_too_few_to_keep(keep: int, include_first: bool) -> None:
    with pytest.raises(ValueError, match=f"keep must be >= {keep + 1}, got {keep}"):
        streaming_top_k(torch.zeros(1, 1, 4), keep, include_first=include_first)


def test_lists_of_the_chosen() -> None:
    chosen = torch.tensor([[[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0]]]).bool()
    assert listed(chosen).tolist() == [[[1, 3, 4], [-1] * 3], [[0, -1, -1], [1, 2, -1]]]
    assert listed(chosen[:1, 1:]).shape == (1, 1, 0)
    assert listed(chosen[..., :0]).shape == (2, 2, 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_lists_hold_the_chosen_in_their_order(share: float) -> None:
    chosen = torch.rand(3, 4, 11) < share
    lists = [[[t for t in range(11) if mine[t]] for mine in row] for row in chosen]
    longest = max(len(mine) for row in lists for mine in row)
    assert listed(chosen).tolist() == [[mine + [-1] * (longest - len(mine)) for mine in row] for row in lists]
