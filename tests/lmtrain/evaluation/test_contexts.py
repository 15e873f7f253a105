"""Loss by context: the same targets at every context, each seeing what it says."""

import math

import numpy as np
import pytest
import torch

from lmtrain.evaluation import contexts
from lmtrain.evaluation.contexts import evaluate_by_context
from lmtrain.evaluation.evaluate import evaluate
from tests.lmtrain.evaluation.scoring import bigram_model, decoder, peeking_model, random_dataset


def by_hand(model, text, context, longest, shortest):
    """Nats and tokens at one context: each target by a pass of its own over what it sees.

    The last min(T, C / 2) targets of each window of C, in windows of c that end every min(T, c / 2) of them.
    """
    tokens = torch.from_numpy(text.tokens.astype(np.int64))
    targets, nats, count = min(contexts.TARGETS, longest // 2), 0.0, 0
    for end in range(longest, len(tokens), longest):
        wanted = list(range(end - targets + 1, end + 1))
        step = min(contexts.TARGETS, context // 2)
        for group in (wanted[i : i + step] for i in range(0, targets, step)):
            for target in group:
                start = group[-1] - context
                assert context / 2 < target - start <= context
                logits = model(tokens[None, start:target])[0, -1].detach()
                nats -= float(logits.log_softmax(-1)[tokens[target]])
                count += 1
    return nats, count


@pytest.mark.parametrize("longest", [32, 40, 21])
def test_each_target_by_hand(longest, monkeypatch):
    monkeypatch.setattr(contexts, "SHORTEST", 4)
    monkeypatch.setattr(contexts, "TARGETS", 8)
    model, text = decoder("all"), random_dataset(150)
    found = evaluate_by_context(model, text, context=longest, trained_length=16)
    assert [c.context for c in found] == [4, 8, 16] + ([32] if longest == 40 else []) + [longest]
    for c in found:
        nats, tokens = by_hand(model, text, c.context, longest, 4)
        assert (c.tokens, c.beyond_training) == (tokens, c.context > 16)
        assert c.nats == pytest.approx(nats, abs=1e-9)
        assert c.loss == pytest.approx(nats / tokens)
        assert c.bits_per_byte == pytest.approx(nats / math.log(2) / c.bytes)
    assert len({c.tokens for c in found}) == len({c.bytes for c in found}) == 1


def test_a_model_that_looks_one_token_back_has_the_same_loss_at_every_context():
    found = evaluate_by_context(bigram_model(), random_dataset(5000), context=2048)
    assert [c.context for c in found] == [128, 256, 512, 1024, 2048]
    assert [c.tokens for c in found] == [2 * 256] * 5
    assert [c.nats for c in found] == pytest.approx([found[0].nats] * 5, abs=1e-9)


def test_the_longest_context_is_the_tail_of_the_disjoint_windows():
    """What the ordinary protocol adds between stride C / 2 and its first half, for a text of one window."""
    model, text = decoder("all"), random_dataset(65)
    (whole,) = evaluate_by_context(model, text, context=64)
    first_half = evaluate(model, text, context=64, stride=64, max_tokens=32)
    assert whole.nats == pytest.approx(evaluate(model, text, context=64, stride=64).nats - first_half.nats, abs=1e-9)


def test_documents_that_are_shorter_have_no_part_in_it():
    model, text = decoder("all"), random_dataset(200, documents=(0, 40, 110))
    found = evaluate_by_context(model, text, context=60, documents="reset")
    assert found[0].tokens == 2 * 30
    with pytest.raises(ValueError, match="no document of toy corpus validation has more than 100 tokens"):
        evaluate_by_context(model, text, context=100, documents="reset")


def test_refuses_a_model_that_selects_ahead():
    with pytest.raises(ValueError, match="--by-context: the model selects ahead"):
        evaluate_by_context(peeking_model(4), random_dataset(50), context=8)
