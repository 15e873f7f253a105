"""Every target is scored exactly once, for every context and stride."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.windows import Window, windows

SIZES = st.integers(0, 200), st.integers(1, 60), st.floats(0, 1)


@given(*SIZES)
def test_every_target_is_scored_exactly_once(num_tokens: int, context: int, share: float) -> None:
    stride = 1 + int(share * (context - 1))
    scored = [t for _, end, first in windows(num_tokens, context, stride) for t in range(first, end + 1)]
    assert scored == list(range(1, num_tokens))


@given(*SIZES)
def test_windows_read_no_more_than_the_context_and_score_what_they_read(
    num_tokens: int, context: int, share: float
) -> None:
    stride = 1 + int(share * (context - 1))
    for start, end, first in windows(num_tokens, context, stride):
        assert 0 <= start < end < num_tokens
        assert end - start <= context
        assert start < first <= end


@given(*SIZES)
def test_every_target_but_the_first_window_has_more_than_context_minus_stride(
    num_tokens: int, context: int, share: float
) -> None:
    stride = 1 + int(share * (context - 1))
    for start, _, first in list(windows(num_tokens, context, stride))[1:]:
        assert first - start == context - stride + 1


def test_windows_by_hand() -> None:
    assert list(windows(10, 4, 4)) == [Window(0, 4, 1), Window(4, 8, 5), Window(8, 9, 9)]
    assert list(windows(10, 4, 2)) == [Window(0, 4, 1), Window(2, 6, 5), Window(4, 8, 7), Window(6, 9, 9)]
    assert list(windows(9, 4, 4)) == [Window(0, 4, 1), Window(4, 8, 5)]
    assert list(windows(3, 4, 1)) == [Window(0, 2, 1)]
    assert list(windows(1, 4, 4)) == list(windows(0, 4, 4)) == []


@pytest.mark.parametrize(("context", "stride"), [(4, 5), (4, 0), (4, -1), (0, 0)])
def test_a_stride_outside_the_context_is_refused(context: int, stride: int) -> None:
    with pytest.raises(ValueError, match=r"eval\.stride"):
        next(windows(10, context, stride))
