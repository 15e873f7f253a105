"""Scoring with the state carried: what bounds it, and where it equals sliding windows."""

import pytest

from lmtrain.config import ModelConfig
from lmtrain.evaluate import evaluate_carried
from lmtrain.model import DecoderLM
from tests.lmtrain.scoring import bigram_model, dataset_of, decoder, peeking_model, random_dataset


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
