"""Scoring in windows: hand-computed numbers, every target once, whatever the windows and batches."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import lmtrain.evaluation.scoring as scoring_module
from lmtrain.evaluation.evaluate import EvaluationStopped, evaluate, evaluate_carried
from lmtrain.loss import token_losses
from tests.lmtrain.evaluation.scoring import BIGRAM, PROTOCOLS, bigram_model, dataset_of, decoder, random_dataset


class TestNumbers:
    """0 1 2 0 0 1 costs 2 + 1 + 2 + 1 + 2 = 8 bits, for targets of 2 + 3 + 1 + 1 + 2 bytes."""

    dataset = dataset_of([0, 1, 2, 0, 0, 1])

    @pytest.mark.parametrize("context_and_stride", PROTOCOLS)
    def test_hand_computed(self, context_and_stride):
        context, stride = context_and_stride
        result = evaluate(bigram_model(), self.dataset, context=context, stride=stride)
        assert result.scored_tokens == 5
        assert result.bytes == 9
        assert result.words == 4
        assert result.nats == pytest.approx(8 * math.log(2), abs=1e-12)
        assert result.loss == pytest.approx(8 / 5 * math.log(2), abs=1e-12)
        assert result.bits_per_byte == pytest.approx(8 / 9, abs=1e-12)
        assert result.token_perplexity == pytest.approx(2 ** (8 / 5), abs=1e-12)
        assert result.word_perplexity == pytest.approx(2 ** (8 / 4), abs=1e-12)

    def test_loss_by_position(self):
        """Context 130: windows see 1..130, 1..130, 1..39; the bucket edges belong to the lower bucket."""
        tokens = [0] * 300
        tokens[64], tokens[65] = 1, 2  # the targets that saw 64 and 65 tokens of the first window
        result = evaluate(bigram_model(), dataset_of(tokens), context=130, stride=130)
        first, second, third = result.by_position
        assert (first.start, first.stop, first.tokens) == (0, 64, 64 + 64 + 39)
        assert (second.start, second.stop, second.tokens) == (64, 128, 64 + 64)
        assert (third.start, third.stop, third.tokens) == (128, 256, 2 + 2)
        assert first.loss == pytest.approx((first.tokens + 1) / first.tokens * math.log(2))  # 0 -> 1: 2 bits
        assert second.loss == pytest.approx((second.tokens + 1) / second.tokens * math.log(2))  # 2 -> 0
        assert sum(bucket.tokens * bucket.loss for bucket in result.by_position) == pytest.approx(result.nats)

    def test_first_scored_position_of_a_sliding_window(self):
        """Context 100, stride 30: later windows score the targets that saw 71..100 tokens."""
        result = evaluate(bigram_model(), dataset_of([0] * 161), context=100, stride=30)
        assert [(bucket.start, bucket.tokens) for bucket in result.by_position] == [(0, 64), (64, 36 + 60)]

    def test_no_number_for_a_diverged_model(self):
        model = bigram_model()
        nn.init.constant_(model.head.weight, math.nan)
        row = evaluate(model, self.dataset, context=4, stride=4).to_json()
        assert row["bits_per_byte"] is row["loss"] is row["token_perplexity"] is None
        json.dumps(row, allow_nan=False)


class TestEveryTargetOnce:
    dataset = random_dataset(300)

    @pytest.mark.parametrize("context_and_stride", PROTOCOLS)
    def test_any_window_is_the_carried_number_for_an_order_1_model(self, context_and_stride):
        context, stride = context_and_stride
        model, dataset = bigram_model(), self.dataset
        first_bytes = dataset.tokenizer.token_bytes[dataset.tokens[0]]
        carried = evaluate_carried(model, self.dataset, seq_len=17)
        strided = evaluate(model, self.dataset, context=context, stride=stride)
        assert strided.nats == pytest.approx(carried.nats, abs=1e-10)
        assert strided.scored_tokens == carried.scored_tokens == 299
        assert strided.bytes == carried.bytes == self.dataset.bytes - first_bytes
        assert strided.protocol.scored_range == carried.protocol.scored_range == (1, 300)

    @pytest.mark.parametrize("length", [2, 16, 17, 18, 32, 33, 34, 36, 37, 38])
    def test_ragged_last_window(self, length):
        """Around one and two windows of 16: the sum is that of the pairs of neighbours."""
        dataset = random_dataset(length, seed=length)
        pairs = zip(dataset.tokens, dataset.tokens[1:])
        nats = -sum(math.log(BIGRAM[left][right]) for left, right in pairs)
        for stride in (4, 16):
            result = evaluate(bigram_model(), dataset, context=16, stride=stride)
            assert result.scored_tokens == length - 1
            assert result.nats == pytest.approx(nats, abs=1e-12)

    @pytest.mark.parametrize("stride", [5, 32])
    def test_batch_size_does_not_change_the_number(self, stride):
        sums: dict = {"nats": 0, "by_position": (), "by_document": (), "by_block": ()}
        model = decoder("near+all")
        alone, together = (
            evaluate(model, self.dataset, context=32, stride=stride, batch_tokens=tokens) for tokens in (1, 10**6)
        )
        assert alone.nats == pytest.approx(together.nats, abs=1e-12 * 299)
        assert replace(alone, **sums) == replace(together, **sums)

    def test_only_scored_positions_go_through_the_head_and_no_more_than_asked(self, monkeypatch):
        rows = []

        def counted(hidden, weight, labels):
            rows.append(len(hidden))
            return token_losses(hidden, weight, labels)

        monkeypatch.setattr(scoring_module, "token_losses", counted)
        evaluate(decoder("near"), self.dataset, context=32, stride=2)
        assert sum(rows) == 299
        rows.clear()
        evaluate(decoder("near"), self.dataset, context=32, stride=32, batch_tokens=100)
        assert rows == [96, 96, 96, 11]


class TestBehaviour:
    def test_stops_between_batches_and_restores_the_mode(self):
        model, polls = decoder("near").train(), []

        def third():
            polls.append(model.training)
            return len(polls) == 3

        with pytest.raises(EvaluationStopped):
            evaluate(model, random_dataset(100), context=8, stride=8, batch_tokens=8, should_stop=third)
        assert polls == [False] * 3
        assert model.training
        assert torch.is_grad_enabled()
        with pytest.raises(EvaluationStopped):
            evaluate_carried(model, random_dataset(100), seq_len=8, should_stop=lambda: True)

    def test_leaves_training_alone(self):
        """Dropout is off, the random state untouched, and what is remembered bears gradients afterwards."""
        model, dataset = decoder("near+all", dropout=0.5).train(), random_dataset(100)
        before = torch.get_rng_state()
        first, second = (evaluate(model, dataset, context=16, stride=16) for _ in range(2))
        assert first == second
        assert torch.equal(before, torch.get_rng_state())
        tokens = torch.from_numpy(dataset.tokens[None, :17].astype(np.int64))
        model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()

    def test_autocast_is_used(self):
        model, dataset = decoder("all").float(), random_dataset(100)
        full = evaluate(model, dataset, context=16, stride=16)
        half = evaluate(model, dataset, context=16, stride=16, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
        assert half.loss != full.loss
        assert half.loss == pytest.approx(full.loss, rel=0.02)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"context": 4, "stride": 5}, "stride"),
            ({"context": 4, "stride": 0}, "stride"),
            ({"context": 4, "stride": 4, "max_tokens": 0}, "max_tokens"),
            ({"context": 4, "stride": 4, "documents": "packed"}, "concatenate or reset"),
        ],
    )
    def test_impossible_protocols(self, options, message):
        with pytest.raises(ValueError, match=message):
            evaluate(bigram_model(), random_dataset(20), **options)

    def test_a_larger_vocabulary_than_the_model_knows(self):
        with pytest.raises(ValueError, match="knows 3 tokens, toy corpus is written in 5"):
            evaluate(bigram_model(), random_dataset(20, 5), context=4, stride=4)
