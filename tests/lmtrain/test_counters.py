"""The counters of a run survive a checkpoint, those of earlier versions included."""

import json
from typing import Any

import pytest

from lmtrain.counters import Counters, misfits

FULL = Counters(9, 40, 1152, 3, 2, 1, ((4, 8), (16, 20)))


def kept(**changed: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(FULL.state())), **changed}


def test_json_brings_them_back() -> None:
    counters = Counters(unread=((1, 2),))
    counters.load(kept(seq_len=32))
    assert counters == FULL
    assert misfits(kept(seq_len=32)) == []


def test_what_earlier_versions_did_not_keep_is_nothing() -> None:
    early = {name: value for name, value in kept().items() if name not in ("rollbacks", "unread")}
    assert misfits(early) == []
    counters = Counters(rollbacks=5, unread=((1, 2),))
    counters.load(early)
    assert (counters.step, counters.rollbacks, counters.unread) == (9, 0, ())


@pytest.mark.parametrize("name", ["step", "samples", "tokens", "skipped", "skips_in_a_row"])
def test_what_all_versions_kept_must_be_there(name: str) -> None:
    state = kept()
    del state[name]
    assert misfits(state) == [name]


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None, 2**63])
def test_what_is_no_count(value: Any) -> None:
    assert misfits(kept(step=value, rollbacks=value)) == ["step", "rollbacks"]


@pytest.mark.parametrize("value", [None, {}, [3], [[1]], [[2, 1]], [[-1, 1]], [[1, 2, 3]], [["1", "2"]]])
def test_what_are_no_ranges(value: Any) -> None:
    assert misfits(kept(unread=value)) == ["unread"]


def test_skips_in_a_row_end_with_an_update() -> None:
    counters = Counters()
    for skipped in (True, False, True, True):
        counters.count(counters.samples + 4, 128, skipped)
    assert (counters.step, counters.samples, counters.tokens) == (4, 16, 512)
    assert (counters.skipped, counters.skips_in_a_row) == (3, 2)
