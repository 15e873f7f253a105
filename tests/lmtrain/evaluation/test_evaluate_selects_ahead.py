"""Models that select ahead are scored prefix by prefix, and their leak is named."""

import json
import math

import numpy as np
import pytest
import torch

from lmtrain.config import ModelConfig
from lmtrain.evaluation.evaluate import evaluate
from lmtrain.evaluation.words import format_result
from lmtrain.model import DecoderLM
from tests.lmtrain.evaluation.scoring import decoder, peeking_model, random_dataset


class TestSelectsAhead:
    def test_the_gap_is_the_leak(self):
        """In one pass all but the last target of a window are given away; prefix by prefix none is."""
        result = evaluate(peeking_model(4), random_dataset(201, 4), context=20, stride=20)
        assert result.protocol.scoring == "prefix-wise"
        assert result.nats == pytest.approx(200 * math.log(4), abs=1e-9)
        assert result.leak.one_pass_nats == pytest.approx(10 * math.log(4), abs=1e-9)
        assert result.leak.gap == pytest.approx(190 / 200 * math.log(4), abs=1e-12)
        assert (result.leak.prefixes, result.leak.standard_error) == (
            200,
            0,
        )  # all targets: nothing is left to chance
        assert (result.token_perplexity, result.word_perplexity) == (
            pytest.approx(4),
            pytest.approx(math.exp(200 * math.log(4) / 4)),
        )

    def test_the_row_has_three_columns(self):
        result = evaluate(peeking_model(4), random_dataset(201, 4), context=20, stride=20)
        row = result.to_json()
        assert row["one_pass_bits_per_byte"] == pytest.approx(10 / 200 * row["bits_per_byte"], abs=1e-12)
        assert row["gap"] == pytest.approx(190 / 200 * row["bits_per_byte"], abs=1e-12)
        assert row["gap_interval"] == pytest.approx([row["gap"]] * 2)
        assert row["one_pass_loss"] + row["loss_gap"] == pytest.approx(row["loss"], abs=1e-12)
        assert (row["prefixes"], row["scoring"]) == (200, "prefix-wise")
        assert "stratified by tokens seen" in row["sampling"]
        positions = [(p["start"], p["stop"], p["tokens"], p["prefixes"]) for p in row["leak_by_position"]]
        assert positions == [(0, 8, 80, 80), (8, 16, 80, 80), (16, 32, 40, 40)]
        assert [p["gap"] for p in row["leak_by_position"]] == pytest.approx([math.log(4)] * 2 + [0.75 * math.log(4)])
        assert [b["tokens"] for b in row["loss_by_position"]] == [80, 80, 40]
        assert [b["loss"] for b in row["loss_by_position"]] == pytest.approx([math.log(4)] * 3)
        json.dumps(row, allow_nan=False)

    def test_the_three_columns_in_print(self):
        text = format_result(evaluate(peeking_model(4), random_dataset(201, 4), context=20, stride=20))
        header, bits, nats, *_ = text.split("\n\n")[1].splitlines()
        assert header.split("  ")[-1].strip() == "95 % interval"
        assert header.index("one pass (leaks)") < header.index("prefix-wise") < header.index("gap")
        assert nats.split()[:6] == ["nats", "per", "token", "0.0693", "1.3863", "1.3170"]
        assert bits.startswith("bits per byte")
        assert "no perplexity" in text.splitlines()[-1]

    def test_who_selects_is_named_with_the_numbers_of_its_config(self):
        mixers = {"far": {"kind": "mosa", "heads": 2, "head_dim": 4, "keep": 3, "selection": "paper"}}
        mixers["near"] = {"kind": "local", "heads": 2, "window": 4}
        torch.manual_seed(0)
        config = ModelConfig(dim=8, layers=2, ffn_dim=8, vocab_size=3, mixers=mixers, pattern="near far")
        result = evaluate(DecoderLM(config).double(), random_dataset(60), context=12, stride=12)
        assert list(result.leak.selections) == ["far"]
        assert result.to_json()["selections"]["far"]["keep"] == 3
        assert "far is mosa with heads 2, head_dim 4, keep 3: the numbers of the config" in format_result(result)

    def test_a_prefix_is_read_alone(self):
        """Every target of a published selection, one by one, by hand."""
        mixers = {"far": {"kind": "mosa", "heads": 2, "head_dim": 4, "keep": 3, "selection": "paper"}}
        torch.manual_seed(1)
        config = ModelConfig(dim=8, layers=2, ffn_dim=8, vocab_size=3, mixers=mixers, pattern="far", init_std=0.9)
        model, dataset = DecoderLM(config).double(), random_dataset(50)
        tokens = torch.from_numpy(dataset.tokens.astype(np.int64))
        nats = 0.0
        for target in range(1, 50):
            start = (target - 1) // 12 * 12
            logits = model(tokens[None, start:target])[0, -1].detach()
            nats -= float(logits.log_softmax(-1)[tokens[target]])
        result = evaluate(model, dataset, context=12, stride=12)
        assert result.nats == pytest.approx(nats, abs=1e-9)
        assert abs(result.leak.one_pass_nats - nats) > 1e-3

    def test_a_sample_estimates_it(self):
        result = evaluate(peeking_model(4), random_dataset(2001, 4), context=8, stride=8, prefixes=150)
        truth = 7 / 8 * math.log(4)
        error = math.sqrt(7 / 8 * 1 / 8) * math.log(4) / math.sqrt(150) * math.sqrt(1 - 150 / 2000)
        assert result.leak.prefixes == 150
        assert result.leak.standard_error == pytest.approx(error, rel=0.3)
        assert abs(result.leak.gap - truth) < 4 * error
        assert sum(bucket.tokens for bucket in result.by_position) == 2000

    @pytest.mark.parametrize("stride", [6, 24])
    @pytest.mark.parametrize("prefixes", [None, 30])
    def test_both_scorings_agree_for_a_strict_model(self, stride, prefixes):
        class Suspected(DecoderLM):
            causality = "selects_ahead"

        model, dataset = decoder("near+all"), random_dataset(100)
        one_pass = evaluate(model, dataset, context=24, stride=stride)
        model.__class__ = Suspected
        prefix_wise = evaluate(model, dataset, context=24, stride=stride, prefixes=prefixes)
        assert prefix_wise.protocol.scoring == "prefix-wise"
        assert prefix_wise.nats == pytest.approx(one_pass.nats, abs=1e-10)
        assert abs(prefix_wise.leak.gap) < 1e-13
        assert prefix_wise.leak.standard_error < 1e-13
        assert prefix_wise.leak.prefixes == (99 if prefixes is None else pytest.approx(30, abs=3))
        assert prefix_wise.bits_per_byte == pytest.approx(one_pass.bits_per_byte, abs=1e-12)
        assert prefix_wise.token_perplexity == pytest.approx(one_pass.token_perplexity, abs=1e-9)

    def test_no_prefix_is_no_sample(self):
        with pytest.raises(ValueError, match="at least 1 prefix"):
            evaluate(peeking_model(4), random_dataset(20, 4), context=8, stride=8, prefixes=0)

    def test_who_waits_is_told(self):
        told = []
        evaluate(
            peeking_model(4),
            random_dataset(101, 4),
            context=20,
            stride=20,
            batch_tokens=40,
            watch=lambda *what: told.append(what),
        )
        passes = [what[1:] for what in told if what[0] == "one pass"]
        assert passes == [(0, 100), (40, 100), (80, 100), (100, 100)]
        alone = [what[1:] for what in told if what[0] == "100 prefixes"]
        assert (alone[0], alone[-1]) == ((0, 5 * 210), (5 * 210, 5 * 210))
