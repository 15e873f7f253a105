"""Loss by context length: what the same targets cost where the text before them is cut shorter and shorter.

Loss by position compares different targets. Here every number is of the same ones: the last `TARGETS` of each disjoint
window of C tokens. At a context c they are scored in windows of c tokens that end every min(`TARGETS`, c / 2): each
then sees more than c / 2 tokens, and at most c.
"""

from collections.abc import Iterator
from contextlib import nullcontext

from data.dataset import TokenDataset
from data.windows import Window
from lmtrain.evaluation.result import ContextLoss
from lmtrain.evaluation.scoring import Autocast, Scorer, Watch, evaluating, spans_of
from lmtrain.model import DecoderLM
from parallel.world import ALONE, World

SHORTEST = 128
TARGETS = 256
"""Of each window, or half of a window of fewer than twice as many tokens."""


def evaluate_by_context(
    model: DecoderLM,
    dataset: TokenDataset,
    *,
    context: int,
    documents: str = "concatenate",
    trained_length: int | None = None,
    autocast: Autocast = nullcontext,
    watch: Watch = lambda what, done, total: None,
    world: World = ALONE,
) -> tuple[ContextLoss, ...]:
    """The loss at contexts of 128, 256, 512, ... and `context` tokens.

    documents: as in `evaluate`; stretches of `context` tokens or fewer have no such window. trained_length: tokens of
    the sequences of training, to tell which contexts are longer. ValueError for a model that selects ahead, whose one
    pass is no loss, and for a text that is too short.
    """
    if model.causality != "strict":
        raise ValueError("--by-context: the model selects ahead, so what one pass says of a context is no loss")
    spans = spans_of(model, dataset, documents)
    blocks = [block for span in spans for block in _last_targets(*span, context)]
    if not blocks:
        raise ValueError(
            f"--by-context: no {'text' if documents == 'concatenate' else 'document'} of {dataset.corpus} "
            f"{dataset.split} has more than {context:,} tokens; give a shorter --context"
        )
    scorer = Scorer(model, dataset, watch=watch, world=world)
    with evaluating(model), autocast():
        return tuple(_at(c, blocks, scorer, trained_length) for c in _contexts(context))


def _contexts(longest: int) -> list[int]:
    """`SHORTEST` and its doubles below the longest, and that."""
    return [c for c in (SHORTEST << n for n in range(32)) if c < longest] + [longest]


def _last_targets(start: int, stop: int, context: int) -> Iterator[tuple[int, int]]:
    """The last targets, as ranges [first, last], of the disjoint windows of `context` in tokens [start, stop)."""
    targets = min(TARGETS, max(1, context // 2))
    return ((end - targets + 1, end) for end in range(start + context, stop, context))


def _at(context: int, blocks: list[tuple[int, int]], scorer: Scorer, trained_length: int | None) -> ContextLoss:
    windows = [window for block in blocks for window in _windows(*block, context)]
    # Equal shapes side by side, for larger batches.
    windows.sort(key=lambda w: w.end - w.first_scored)
    tokens, size, nats = 0, 0, 0.0
    token_bytes = scorer.dataset.tokenizer.token_bytes
    for scored in scorer.score(windows, f"context {context:,}", context * len(windows)):
        tokens += scored.losses.size
        size += int(token_bytes[scored.targets].sum())
        nats += float(scored.losses.sum())
    return ContextLoss(context, tokens, size, nats, trained_length is not None and context > trained_length)


def _windows(first: int, last: int, context: int) -> Iterator[Window]:
    """Windows of `context` tokens whose targets make up [first, last]."""
    stride = min(TARGETS, max(1, context // 2))
    for begin in range(first, last + 1, stride):
        end = min(begin + stride - 1, last)
        yield Window(end - context, end, begin)
