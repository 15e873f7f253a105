"""Evaluation windows: every target of a token stream is scored exactly once, for every context and stride."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """The inputs tokens[start:end] predict the targets tokens[start + 1 : end + 1].

    Of these, tokens[first_scored : end + 1] count; for the others an earlier window did.
    """

    start: int
    end: int
    first_scored: int


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of up to `context` inputs that end every `stride` tokens; each scores what no earlier one did.

    The first window scores all its targets, the short one at the end is included: tokens 1 .. num_tokens - 1
    are scored once each, token 0 never, for nothing precedes it. After the first window every target is
    predicted from more than context - stride tokens; stride = context makes disjoint windows. ValueError
    unless 1 <= stride <= context.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"eval.stride: must be from 1 to the context, {context}, not {stride}")
    num_inputs = num_tokens - 1
    if num_inputs < 1:
        return
    yield Window(0, min(context, num_inputs), 1)
    for scored in range(context, num_inputs, stride):
        yield Window(scored + stride - context, min(scored + stride, num_inputs), scored + 1)
