"""Paired comparisons: by hand on few units, intervals that hold the truth, and texts that cannot be compared."""

import json
import math
from itertools import product

import numpy as np
import pytest

from lmtrain.evaluation import compare as compare_module
from lmtrain.evaluation.compare import bootstrap, compare, read_row, text_sha256
from lmtrain.evaluation.evaluate import evaluate
from tests.lmtrain.evaluation.scoring import bigram_model, dataset_of, decoder, peeking_model


def row(nats, sizes=None, unit="document", **changes):
    """What `eval --by-document` writes of units with these numbers."""
    sizes = [10] * len(nats) if sizes is None else sizes
    parts = [{"title": str(i), "nats": n, "bytes": b, "tokens": b} for i, (n, b) in enumerate(zip(nats, sizes))]
    alone = [{"title": "all", "nats": sum(n or 0 for n in nats), "bytes": sum(sizes), "tokens": sum(sizes)}]
    documents, blocks = (parts, []) if unit == "document" else (alone, parts)
    return {
        "corpus": "toy", "split": "test", "fingerprint": "f", "text_sha256": "t" * 64, "documents": "reset",
        "whole_split": True, "by_document": documents, "by_block": blocks, "tokenizer": "bytes", "context": 8,
        "stride": 8, "carry": None, "checkpoint": "runs/x", "bits_per_byte": 1.0, **changes,
    }  # fmt: skip


class TestNumbers:
    def test_two_units_by_hand(self):
        """Of two units with 4 and 1 nats more of A in 10 and 30 bytes the resamples are both, or one of them twice."""
        found = bootstrap(np.array([[9.0, 8.0], [5.0, 7.0]]), np.array([[10.0, 30.0], [10.0, 30.0]]))
        assert found.value == pytest.approx(5 / 40)
        assert found.low == pytest.approx(2 / 60)
        assert found.high == pytest.approx(8 / 20)
        assert found.wrong_sign == 0

    def test_every_resample_of_three_units(self):
        """The share of the contrary sign over all 27 resamples, which 2,000 estimate to 0.011."""
        nats, sizes = np.array([[5.0, 1.0, 2.0], [1.0, 2.0, 3.0]]), np.array([[9.0, 3.0, 4.0]] * 2)
        differences = [
            sum(nats[0, i] - nats[1, i] for i in drawn) / sum(sizes[0, i] for i in drawn)
            for drawn in product(range(3), repeat=3)
        ]
        found = bootstrap(nats, sizes)
        assert found.value == pytest.approx(2 / 16)
        contrary = sum(d < 0 for d in differences) / 27
        assert 0.2 < contrary < 0.4
        assert found.wrong_sign == pytest.approx(contrary, abs=0.05)
        assert found.low == pytest.approx(min(differences))

    def test_the_same_model_twice(self):
        found = compare(row([3.0] * 12), row([3.0] * 12)).bits_per_byte
        assert (found.value, found.low, found.high, found.wrong_sign) == (0, 0, 0, 0.5)

    def test_the_same_seed_draws_the_same(self):
        nats, sizes = np.random.default_rng(0).random((2, 20)), np.ones((2, 20))
        assert bootstrap(nats, sizes) == bootstrap(nats, sizes) != bootstrap(nats, sizes, seed=1)

    def test_by_documents_and_who_is_better_where(self):
        a, b = [1.0] * 9 + [5.0] * 3, [2.0] * 9 + [4.0] * 3
        found = compare(row(a), row(b))
        assert (found.unit, found.units, found.better) == ("document", 12, 9)
        assert found.bits_per_byte.value == pytest.approx(-6 / 120 / math.log(2))
        assert found.nats_per_token is not None
        assert found.nats_per_token.value == pytest.approx(-6 / 120)

    def test_by_blocks_where_documents_are_few(self):
        found = compare(row([1.0, 3.0], unit="block"), row([2.0, 2.0], unit="block"))
        assert (found.unit, found.units, found.better) == ("block", 2, 1)
        assert "fewer than 30 blocks: the interval is too narrow" in found.format()

    def test_documents_of_one_token_count_for_nothing(self):
        found = compare(row([1.0] * 11 + [0.0], [10] * 11 + [0]), row([2.0] * 11 + [0.0], [10] * 11 + [0]))
        assert (found.units, found.better) == (11, 11)

    def test_other_tokenizers_compare_by_bytes_alone(self):
        a, b = row([4.0] * 12, [10] * 12), row([6.0] * 12, [9] + [10] * 11, fingerprint="g", tokenizer="bpe")
        found = compare(a, b)
        assert found.nats_per_token is None
        assert found.bits_per_byte.value == pytest.approx((48 / 120 - 72 / 119) / math.log(2))
        assert found.to_json()["nats_per_token"] is None

    @pytest.mark.parametrize(("units", "least"), [(10, 0.83), (30, 0.86), (100, 0.88)])
    def test_the_interval_holds_the_truth_about_as_often_as_it_says(self, units, least):
        """Documents whose losses spread by 0.3 nats, of sizes that spread twofold: about .89, .90 and .92 of 100."""
        generator, held, repeats, truth = np.random.default_rng(units), 0, 200, 0.01
        for _ in range(repeats):
            sizes = 1000 * generator.lognormal(0, 0.7, units)
            of_document = generator.normal(3, 0.3, units)
            gap = truth + generator.normal(0, 0.04, units)
            found = bootstrap(np.stack([of_document + gap, of_document]) * sizes, np.stack([sizes, sizes]))
            held += found.low <= truth <= found.high
        assert least <= held / repeats <= 0.98
        assert found.high - found.low < 0.3  # the spread of the documents is not in it


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"text_sha256": "u" * 64}, r"their texts differ, toy test \(tttttttt\) and toy test \(uuuuuuuu\)"),
            ({"documents": "concatenate"}, "documents are reset in one and concatenate in the other"),
            ({"whole_split": False}, "of the second only a part of the text was scored"),
            ({"by_document": [], "by_block": []}, "the second selects ahead"),
            ({"by_document": row([1.0] * 11)["by_document"]}, "they count other documents in the same text"),
            ({"by_document": row([None] * 12)["by_document"]}, "the second has losses that are not finite"),
        ],
    )
    def test_other_targets(self, changes, message):
        with pytest.raises(ValueError, match=message):
            compare(row([1.0] * 12), row([1.0] * 12, **changes))

    def test_all_reasons_at_once(self):
        with pytest.raises(ValueError, match=r"(?s)texts differ.*documents are.*only a part"):
            compare(row([1.0] * 12), row([1.0] * 12, text_sha256="u", documents="x", whole_split=False))

    def test_one_unit_says_nothing_of_chance(self):
        with pytest.raises(ValueError, match="only one block"):
            compare(row([1.0], unit="block"), row([1.0], unit="block"))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"[1, 2]", "no numbers by document"),
            (b"{", "not a result of lmtrain eval"),
            (b"[" * 100_000, "not a result of lmtrain eval"),
            (json.dumps(row([1.0], corpus=3)).encode(), "damaged: corpus"),
            (json.dumps(row([1.0], by_block=None)).encode(), "damaged: by_block"),
            (b'{"by_document": 3}', "damaged: corpus"),
            (json.dumps(row([1.0], by_block=[5])).encode(), "damaged: no tokens and bytes in 5"),
            (json.dumps(row([1.0], by_block=[{"bytes": 1, "tokens": -1}])).encode(), "damaged: no tokens and bytes"),
            (json.dumps(row([1.0], by_block=[{"bytes": 1, "tokens": 1, "nats": "1"}])).encode(), "damaged: no nats"),
            (json.dumps(row([math.nan])).encode(), "damaged: no nats"),
            (json.dumps(row([1.0], context="8")).encode(), "damaged: context"),
        ],
    )
    def test_a_file_that_is_no_result_is_named(self, tmp_path, content, message):
        path = tmp_path / "result.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"result.json: .*{message}"):
            read_row(path)

    def test_a_file_that_is_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr(compare_module, "MAX_BYTES", 10)
        path = tmp_path / "result.json"
        path.write_text(json.dumps(row([1.0])))
        with pytest.raises(ValueError, match="too many for a result"):
            read_row(path)


class TestText:
    """The text of letters, whatever the tokenizer: `aabbcc` is three tokens of two letters, or six of one."""

    def test_is_the_same_for_another_tokenizer(self):
        coarse = dataset_of([0, 1, 2], token_bytes=(2, 2, 2))
        fine = dataset_of([0, 0, 1, 1, 2, 2], token_bytes=(1, 1, 1))
        assert text_sha256(coarse) == text_sha256(fine)

    def test_is_another_with_another_letter_or_border(self):
        texts = [dataset_of([0, 1, 2, 0]), dataset_of([0, 1, 2, 1])]
        texts += [dataset_of([0, 1, 2, 0], documents) for documents in ((0, 1), (0, 2), (0, 1, 2))]
        assert len({text_sha256(text) for text in texts}) == 5

    def test_in_pieces(self, monkeypatch):
        text = dataset_of([0, 1, 2, 0, 1, 1, 2], (0, 4))
        whole = text_sha256(text)
        monkeypatch.setattr(compare_module, "CHUNK", 2)
        assert text_sha256(text) == whole

    def test_two_models_on_one_text(self):
        """The difference is that of their bits per byte; by document it is that of their sums."""
        text = dataset_of(np.random.default_rng(3).integers(0, 3, 300), range(0, 300, 25), words=[5] * 12)
        results = [evaluate(m, text, context=8, stride=8, documents="reset") for m in (decoder("near"), bigram_model())]
        rows = [r.to_json({"text_sha256": text_sha256(text), "checkpoint": "x"}, by_document=True) for r in results]
        found = compare(*rows)
        assert found.units == 12
        assert found.bits_per_byte.value == pytest.approx(results[0].bits_per_byte - results[1].bits_per_byte)
        assert found.nats_per_token is not None
        assert found.nats_per_token.value == pytest.approx(results[0].loss - results[1].loss)
        assert found.bits_per_byte.low < found.bits_per_byte.value < found.bits_per_byte.high
        assert json.loads(json.dumps(found.to_json()))["a"]["checkpoint"] == "x"
        leaking = evaluate(peeking_model(4), text, context=8, stride=8, documents="reset")
        with pytest.raises(ValueError, match="the second selects ahead"):
            compare(rows[0], leaking.to_json({"text_sha256": text_sha256(text)}, by_document=True))
