"""The row of an evaluation, its file, and its words: the protocol stands beside each number."""

import json
import math
from dataclasses import replace

import pytest

from lmtrain.evaluation.evaluate import evaluate, evaluate_carried
from lmtrain.evaluation.result import write_result
from lmtrain.evaluation.words import format_result
from tests.lmtrain.evaluation.scoring import bigram_model, dataset_of

TEXT = dataset_of([0, 1, 2, 0, 0, 1])
"""Costs 8 bits for targets of 9 bytes, see test_evaluate.py."""

SOURCE = {"checkpoint": "runs/x/checkpoints/step-7", "step": 7}


class TestReport:
    def test_row(self):
        result = evaluate(bigram_model(), TEXT, context=4, stride=2)
        row = result.to_json(SOURCE)
        position = row.pop("loss_by_position")
        loss = 8 / 5 * math.log(2)
        assert position == [{"start": 0, "stop": 64, "tokens": 5, "loss": pytest.approx(loss)}]
        assert row == {
            "corpus": "toy corpus",
            "split": "validation",
            "fingerprint": "f1",
            "tokenizer": "toy",
            "documents": "concatenate",
            "scoring": "one-pass",
            "causality": "strict",
            "context": 4,
            "stride": 2,
            "carry": None,
            "scored_range": [1, 6],
            "whole_split": True,
            "first_token": "unscored",
            "bits_per_byte": pytest.approx(8 / 9),
            "token_perplexity": pytest.approx(2**1.6),
            "word_perplexity": pytest.approx(4),
            "loss": pytest.approx(loss),
            "scored_tokens": 5,
            "bytes": 9,
            "words": 4,
            "checkpoint": "runs/x/checkpoints/step-7",
            "step": 7,
        }

    def test_carried_row_has_no_windows(self):
        row = evaluate_carried(bigram_model(), TEXT, seq_len=2).to_json()
        assert (row["context"], row["stride"], row["scoring"], row["carry"]) == (None, None, "carried", 8)

    def test_file(self, tmp_path):
        result = evaluate(bigram_model(), TEXT, context=4, stride=2)
        path = write_result(tmp_path, result.name, result.to_json(SOURCE))
        assert path == tmp_path / "eval/toy_corpus-validation-f1-context4-stride2-step7.json"
        assert json.loads(path.read_text()) == result.to_json(SOURCE)
        part = evaluate_carried(bigram_model(), TEXT, seq_len=2, max_tokens=3)
        assert write_result(tmp_path, part.name, part.to_json()).name == "toy_corpus-validation-f1-carry8-first3.json"
        assert len(list(path.parent.iterdir())) == 2

    def test_a_row_with_more_in_it_does_not_replace_one_without(self, tmp_path):
        result = evaluate(bigram_model(), TEXT, context=4, stride=2)
        plain, detailed = (write_result(tmp_path, result.name, result.to_json(SOURCE, more)) for more in (False, True))
        assert detailed.name == f"{plain.stem}-by-document.json"
        assert plain.exists()

    def test_text_says_the_protocol_beside_the_number(self):
        text = format_result(evaluate(bigram_model(), TEXT, context=4, stride=2))
        assert "toy corpus validation: 0.8889 bits per byte (one-pass, strict)" in text
        assert "5 tokens, 9 bytes, 4 words, the whole split but the first token" in text
        assert "windows of 4, 2 new ones each: a token sees from 3" in text
        disjoint = format_result(evaluate(bigram_model(), TEXT, context=4, stride=4, max_tokens=2))
        assert "disjoint windows: a token sees from 1 to 4" in disjoint
        assert "the beginning of the split" in disjoint
        assert "per word" not in disjoint
        carried = format_result(evaluate_carried(bigram_model(), TEXT, seq_len=2))
        assert "state carried, nothing read twice; no key outlives 8 tokens" in carried

    def test_the_best_and_the_worst_documents(self):
        """Seven documents of two tokens, whose second ones cost 1, 2/3, 1, 1/2, 2, 1/3 and 2 bits per byte."""
        letters = [0, 0, 0, 2, 0, 0, 2, 1, 1, 0, 1, 2, 2, 0]
        text = dataset_of(letters, documents=range(0, 14, 2), words=[2] * 7)
        result = evaluate(bigram_model(), text, context=1, stride=1, documents="reset")
        table = format_result(result, by_document=True).split("\n\n")[1].splitlines()
        assert table[0] == "7 documents, the best 3 and the worst 3 by bits per byte:"
        shown = [line.split()[:3] for line in table[2:]]
        assert [words[1:] for words in shown if words[0] == "document"] == [
            ["5", "0.3333"], ["3", "0.5000"], ["1", "0.6667"], ["2", "1.0000"], ["4", "2.0000"], ["6", "2.0000"],
        ]  # fmt: skip
        assert "by bits per byte" not in format_result(result)

    def test_a_title_writes_nothing_else_on_the_terminal(self):
        text = replace(TEXT, titles=["\x1b[2J\r\n" + "x" * 100])
        shown = format_result(evaluate(bigram_model(), text, context=4, stride=4), by_document=True)
        assert "\x1b" not in shown
        assert "\r" not in shown
        assert "x" * 53 in shown
        assert "x" * 60 not in shown
