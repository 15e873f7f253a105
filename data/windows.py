"""Evaluation windows: every target of a token stream is scored exactly once, whatever context and stride are."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Inputs tokens[start:end], at most `context` of them, predict tokens[start + 1 : end + 1].

    Of these targets, tokens[first_scored : end + 1] count: end + 1 - first_scored of them, the last ones of the window.
    """

    start: int
    end: int
    first_scored: int


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that end every `stride` tokens, each scoring only the targets that no earlier window scored.

    The targets 1 .. num_tokens - 1 are all scored; token 0 is never one, for nothing precedes it. The first window scores
    all its targets. Every later target is predicted from more than context - stride tokens, the short window at the end
    included. stride = context: disjoint windows. ValueError unless 1 <= stride <= context.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"eval.stride: must be from 1 to the context of {context} tokens, not {stride}")
    num_inputs = num_tokens - 1
    if num_inputs < 1:
        return
    yield Window(0, min(context, num_inputs), 1)
    for scored in range(context, num_inputs, stride):
        yield Window(scored + stride - context, min(scored + stride, num_inputs), scored + 1)
