"""Requests of a harness: log-likelihoods by hand, windows as it defines them, continuations as of `generate`."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.tokenizer import ByteTokenizer, CharacterTokenizer
from lmtrain.evaluation.evaluate import evaluate
from lmtrain.generate import generate
from lmtrain.harness.requests import Requests, rolling_rows
from tests.lmtrain.evaluation.scoring import dataset_of, decoder, peeking_model

LETTERS = "\n abcdefgh"


def requests_of(model: Any, tokenizer: Any = None, **options: Any) -> Requests:
    restored: Any = SimpleNamespace(
        model=model,
        tokenizer=tokenizer or CharacterTokenizer(LETTERS),
        autocast=nullcontext,
        config=SimpleNamespace(eval_context=64),
        run=Path("runs/x"),
    )
    return Requests(restored, **options)


@pytest.fixture(scope="module")
def model():
    return decoder("near+all", len(LETTERS))


def by_hand(model, context: str, continuation: str, most: int = 64) -> tuple[float, bool]:
    """Each token of the continuation by a pass of its own over what precedes it; at the start, a newline does."""
    ids = CharacterTokenizer(LETTERS).encode(((context or "\n") + continuation).encode()).astype(np.int64)
    first, total, greedy = len(context or "\n"), 0.0, True
    for at in range(first, len(ids)):
        begin = max(0, len(ids) - 1 - most)
        p = model(torch.from_numpy(ids[None, begin:at]))[0, -1].detach().log_softmax(-1)
        total += float(p[ids[at]])
        greedy &= int(p.argmax()) == ids[at]
    return total, greedy


PAIRS = [("abc", "d"), ("a", " bcd"), ("", "hgf"), ("hh hh gg ab", "e fgh"), ("c", "c"), ("ab" * 30, "cd")]


class TestLogLikelihoods:
    @pytest.mark.parametrize("batch_tokens", [1, 20, 10**6])
    def test_by_hand_whatever_the_batches(self, model, batch_tokens):
        found = requests_of(model, batch_tokens=batch_tokens).log_likelihoods(PAIRS)
        for answer, pair in zip(found, PAIRS, strict=True):
            total, greedy = by_hand(model, *pair)
            assert answer.log_likelihood == pytest.approx(total, abs=1e-10)
            assert answer.greedy == greedy

    def test_what_greedy_decoding_writes_is_greedy_and_nothing_else_is(self, model):
        requests = requests_of(model)
        (written,) = requests.continuations([("ab c", {"max_gen_toks": 4})])
        other = written[:-1] + ("a" if written[-1] != "a" else "b")
        answers = requests.log_likelihoods([("ab c", written), ("ab c", other)])
        assert [answer.greedy for answer in answers] == [True, False]

    def test_spaces_at_the_end_of_the_context_are_the_continuations(self, model):
        one, other = requests_of(model).log_likelihoods([("ab  ", "c"), ("ab", "  c")])
        assert one == other
        blank, newline = requests_of(model).log_likelihoods([("  ", "c"), ("", "  c")])
        assert blank == newline

    def test_no_more_than_max_length_is_seen(self, model):
        requests = requests_of(model, max_length=8)
        (answer,) = requests.log_likelihoods([("abcdefgh" * 3, "abc")])
        assert answer.log_likelihood == pytest.approx(by_hand(model, "abcdefgh" * 3, "abc", most=8)[0], abs=1e-10)
        with pytest.raises(ValueError, match="a continuation of 9 tokens is longer than max_length 8"):
            requests.log_likelihoods([("a", "abcdefgha")])

    def test_nothing_to_say_is_certain(self, model):
        assert requests_of(model).log_likelihoods([("ab", "")]) == [(0.0, True)]


class TestRolling:
    @pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 21])
    def test_rows_are_disjoint_but_for_the_last_ones_past(self, length):
        """Of context 8: targets 1-8 from the newline on, 9-16 from 8, the rest from 8 tokens before its last one."""
        rows = list(rolling_rows(np.array([0]), np.arange(1, length + 1), 8))
        assert [int(t) for row in rows for t in row.ids[-row.targets :]] == list(range(1, length + 1))
        assert [row.targets for row in rows] == [8] * (length // 8) + [length % 8] * (length % 8 > 0)
        assert all(len(row.ids) == min(8, int(row.ids[-1])) + 1 for row in rows)

    def test_by_hand(self, model):
        text = "ab cdef gh abhg fe"
        wanted = 0.0
        for first in range(0, len(text), 8):
            part = text[first : first + 8]
            before = ("\n" + text)[: first + 1]
            wanted += by_hand(model, before, part, most=8)[0]
        assert requests_of(model, max_length=8).rolling([text, "", "a"]) == pytest.approx(
            [wanted, 0.0, by_hand(model, "", "a")[0]], abs=1e-10
        )

    def test_is_our_evaluation_of_the_text_behind_a_newline_where_the_last_window_is_full(self, model):
        """Else the harness lets the tokens of the last window see more than disjoint windows do."""
        text = "ab cdef gh abhg fe gdb"
        for length, equal in [(16, True), (8, True), (21, False)]:
            tokens = CharacterTokenizer(LETTERS).encode(("\n" + text[:length]).encode())
            ours = evaluate(model, dataset_of(tokens, token_bytes=[1] * len(LETTERS)), context=8, stride=8)
            (theirs,) = requests_of(model, max_length=8).rolling([text[:length]])
            assert (abs(ours.nats + theirs) < 1e-10) == equal


class TestContinuations:
    def test_greedy_is_what_generate_writes(self, model):
        requests = requests_of(model)
        expected = b"".join(generate(model, requests.tokenizer, b"ab", length=20, temperature=0)).decode()
        assert requests.continuations([("ab", {"max_gen_toks": 20}), ("ab", {"max_gen_toks": 5})]) == [
            expected,
            expected[:5],
        ]
        (start,) = requests.continuations([("", {"max_gen_toks": 3, "do_sample": False, "temperature": 1.0})])
        assert start == b"".join(generate(model, requests.tokenizer, b"", length=3, temperature=0)).decode()

    @pytest.mark.parametrize("settings", [{}, {"learned_positions": 64}])
    def test_each_prompt_of_a_batch_is_written_on_as_it_would_be_alone(self, settings):
        """Prompts of 1 to 9 letters, continuations of 1 to 20, greedy and drawn; with a table of positions, too."""
        model = decoder("near+all", len(LETTERS), **settings)
        options = [{"max_gen_toks": 1 + 7 * i % 20, "do_sample": i % 2 == 1, "temperature": 1.0} for i in range(9)]
        asked = [("abcdefgha"[: 9 - i], each) for i, each in enumerate(options)]
        for (prompt, each), text in zip(asked, requests_of(model).continuations(asked), strict=True):
            assert len(text) == each["max_gen_toks"]
            if not each["do_sample"]:
                alone = generate(model, CharacterTokenizer(LETTERS), prompt.encode(), length=len(text), temperature=0)
                assert text == b"".join(alone).decode()
        small = requests_of(model, batch_tokens=1).continuations(asked)
        assert small == requests_of(model).continuations(asked)

    def test_ends_before_the_first_stop(self, model):
        requests = requests_of(model)
        (whole,) = requests.continuations([("ab", {"max_gen_toks": 30})])
        stop = whole[6:8]
        cut = whole[: whole.index(stop)]
        assert requests.continuations(
            [("ab", {"max_gen_toks": 30, "until": until}) for until in (stop, ["##", stop])]
        ) == [
            cut,
            cut,
        ]

    def test_samples_repeat(self, model):
        asked = [("ab", {"max_gen_toks": 30, "do_sample": True, "temperature": 0.9, "top_k": 5})] * 2
        first, again = requests_of(model).continuations(asked), requests_of(model).continuations(asked)
        assert first == again
        assert first[0] != first[1]

    def test_an_unknown_option_is_named(self, model):
        with pytest.raises(ValueError, match="beams: no such option"):
            requests_of(model).continuations([("a", {"beams": 4})])
        with pytest.raises(ValueError, match="max_gen_toks: at least 1 token, not 0"):
            requests_of(model).continuations([("a", {"max_gen_toks": 0})])


def test_bytes_that_are_no_character_are_shown():
    (text,) = requests_of(decoder("near", 256), ByteTokenizer()).continuations([("é", {"max_gen_toks": 8})])
    assert isinstance(text, str)
    (answer,) = requests_of(decoder("near", 256), ByteTokenizer()).log_likelihoods([("é", "ü")])
    assert math.isfinite(answer.log_likelihood)


def test_a_model_that_selects_ahead_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="runs/x selects ahead: reading an answer changes"):
        requests_of(peeking_model(len(LETTERS)))


@pytest.mark.parametrize("options", [{"max_length": 0}, {"batch_tokens": 0}])
def test_impossible_sizes(model, options):
    with pytest.raises(ValueError, match="at least 1"):
        requests_of(model, **options)
