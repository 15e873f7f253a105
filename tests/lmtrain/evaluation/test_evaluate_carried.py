"""Scoring with the state carried: what bounds it, and where it equals sliding windows."""

import pytest

from lmtrain.config import ModelConfig
from lmtrain.evaluation.evaluate import evaluate, evaluate_carried
from lmtrain.model import DecoderLM
from tests.lmtrain.evaluation.scoring import bigram_model, dataset_of, decoder, peeking_model, random_dataset


class TestCarried:
    def test_no_key_outlives_carry(self):
        """Dense attention whose keys live for 5 tokens is a sliding window of 5, whatever the segments."""
        dense, local, dataset = decoder("all"), decoder("five"), random_dataset(120)
        local.load_state_dict({k.replace("all", "five"): v for k, v in dense.state_dict().items()})
        window = evaluate_carried(local, dataset, seq_len=11)
        for seq_len in (1, 4, 64):
            limited = evaluate_carried(dense, dataset, seq_len=seq_len, carry=5)
            assert limited.nats == pytest.approx(window.nats, abs=1e-10)

    def test_default_is_four_segments(self):
        model, dataset = decoder("all"), random_dataset(120)
        default = evaluate_carried(model, dataset, seq_len=6)
        assert default.protocol.carry == 24
        assert default.nats == evaluate_carried(model, dataset, seq_len=6, carry=24).nats
        assert abs(default.nats - evaluate_carried(model, dataset, seq_len=6, carry=1000).nats) > 1e-4

    def test_by_position_counts_from_the_start_of_the_stream(self):
        result = evaluate_carried(bigram_model(), dataset_of([0] * 301), seq_len=50)
        assert [(bucket.stop, bucket.tokens) for bucket in result.by_position] == [
            (64, 64),
            (128, 64),
            (256, 128),
            (512, 44),
        ]

    @pytest.mark.parametrize("kind", ["mosa", "routing"])
    def test_published_selections_are_not_carried_in_one_sentence(self, kind):
        mixers = {"far": {"kind": kind, "heads": 2, "selection": "paper"}}
        model = DecoderLM(ModelConfig(dim=16, layers=1, vocab_size=5, mixers=mixers, pattern="far"))
        message = "^--carry: the model selects ahead within each segment; evaluate it without --carry$"
        with pytest.raises(ValueError, match=message):
            evaluate_carried(model, random_dataset(20, 5), seq_len=4)

    def test_refuses_what_cannot_be_carried(self):
        with pytest.raises(ValueError, match="selects ahead"):
            evaluate_carried(peeking_model(4), random_dataset(20), seq_len=4)
        with pytest.raises(ValueError, match="learned_positions"):
            evaluate_carried(decoder("all", learned_positions=99), random_dataset(20), seq_len=4)
        with pytest.raises(ValueError, match="1 token"):
            evaluate_carried(decoder("all"), random_dataset(20), seq_len=4, carry=0)


WINDOWS = {"near": 3, "far": 5, "near+far": 5}
"""Keys of which layer live how long, in tokens."""


class TestBesideSlidingWindows:
    """Two protocols. A key of the second layer was made from what the first one saw, and so on: layers of windows w_i
    reach R = sum of (w_i - 1) tokens back. A window of C tokens that scores the last S of them holds at least C - S
    tokens before the one that precedes a target; so both numbers are equal where R <= C - S, and there alone."""

    text = random_dataset(300)

    @pytest.mark.parametrize("pattern", ["far", "near+far", "near far", "far far far"])
    @pytest.mark.parametrize("stride", [1, 4])
    @pytest.mark.parametrize("seq_len", [3, 64])
    def test_equal_where_the_layers_together_end_inside_the_context_and_nowhere_else(self, pattern, stride, seq_len):
        layers = len(pattern.split())
        model = decoder(pattern, layers=layers)
        reach = sum(WINDOWS[layer] - 1 for layer in pattern.split())
        carried = evaluate_carried(model, self.text, seq_len=seq_len, carry=1000)
        for more, equal in [(-1, False), (0, True), (3, True)]:
            sliding = evaluate(model, self.text, context=reach + stride + more, stride=stride)
            assert (abs(sliding.nats - carried.nats) < 1e-10) == equal

    def test_a_bound_on_the_age_of_keys_is_no_bound_on_what_they_have_seen(self):
        """Two dense layers whose keys live for 5 tokens reach 8 back, though no key is older than 4."""
        model = decoder("all")
        carried = evaluate_carried(model, self.text, seq_len=16, carry=5)
        assert abs(evaluate(model, self.text, context=5, stride=1).nats - carried.nats) > 1e-3
        same = decoder("five")
        same.load_state_dict({k.replace("all", "five"): v for k, v in model.state_dict().items()})
        assert evaluate(same, self.text, context=9, stride=1).nats == pytest.approx(carried.nats, abs=1e-10)
