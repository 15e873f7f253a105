"""A part of the text, and its documents: each alone, and each with its own numbers."""

import itertools
import math

import numpy as np
import pytest

from lmtrain.evaluation import tally
from lmtrain.evaluation.evaluate import evaluate, evaluate_carried
from tests.lmtrain.evaluation.scoring import (
    BIGRAM,
    bigram_model,
    dataset_of,
    decoder,
    peeking_model,
    random_dataset,
    stretch_of,
)


class TestPartAndDocuments:
    @pytest.mark.parametrize("max_tokens", [1, 15, 16, 17, 40])
    def test_max_tokens_is_the_beginning_alone(self, max_tokens):
        model, dataset = decoder("near+far"), random_dataset(100)
        part = evaluate(model, dataset, context=16, stride=8, max_tokens=max_tokens)
        beginning = stretch_of(dataset, 0, max_tokens + 1)
        assert part.nats == evaluate(model, beginning, context=16, stride=8).nats
        assert part.scored_tokens == max_tokens
        assert part.protocol.scored_range == (1, max_tokens + 1)
        assert part.word_perplexity is None
        carried = evaluate_carried(model, dataset, seq_len=9, max_tokens=max_tokens)
        assert (carried.scored_tokens, carried.word_perplexity) == (max_tokens, None)

    def test_as_many_as_there_are_is_the_whole(self):
        result = evaluate(bigram_model(), random_dataset(50), context=8, stride=8, max_tokens=49)
        assert result.protocol.whole_split
        assert result.word_perplexity is not None

    @pytest.mark.parametrize("scorer", ["windows", "carried"])
    def test_documents_are_scored_alone(self, scorer):
        """Documents of 1, 30, 2 and 47 tokens: the number is that of each alone."""

        def score(of, **options):
            if scorer == "carried":
                return evaluate_carried(model, of, seq_len=7, **options)
            return evaluate(model, of, context=12, stride=5, **options)

        model, borders = decoder("all"), [0, 1, 31, 33, 80]
        dataset = random_dataset(80, documents=borders[:-1])
        whole = score(dataset, documents="reset")
        parts = [score(stretch_of(dataset, a, b)) for a, b in [(1, 31), (31, 33), (33, 80)]]
        assert whole.nats == pytest.approx(sum(part.nats for part in parts), abs=1e-12)
        assert whole.scored_tokens == 80 - 4
        assert whole.bytes == sum(part.bytes for part in parts)
        assert whole.protocol.whole_split
        assert whole.to_json()["first_token"] == "unscored in each document"
        assert abs(whole.nats - score(dataset).nats) > 1e-3
        first = score(dataset, documents="reset", max_tokens=29 + 1)
        assert first.nats == pytest.approx(parts[0].nats + parts[1].nats, abs=1e-12)

    def test_nothing_to_score(self):
        for dataset, documents in [
            (random_dataset(1), "concatenate"),
            (random_dataset(3, documents=(0, 1, 2)), "reset"),
        ]:
            with pytest.raises(ValueError, match="nothing to score in toy corpus validation"):
                evaluate(bigram_model(), dataset, context=4, stride=4, documents=documents)


class TestByDocument:
    """Documents of 1, 30, 2 and 47 tokens."""

    borders = (0, 1, 31, 33, 80)
    sizes = (2, 1, 4)
    words = (1, 9, 1, 20)
    text = dataset_of(np.random.default_rng(1).integers(0, 3, 80), borders[:-1], sizes, words)

    def expected(self, rule, stop=80):
        """Tokens, bytes and nats of each document, target by target; the model looks one token back."""
        rows = []
        for start, end in itertools.pairwise(self.borders):
            first = start + 1 if rule == "reset" or start == 0 else start
            targets = range(first, min(end, stop))
            pairs = [(self.text.tokens[i - 1], self.text.tokens[i]) for i in targets]
            nats = -sum(math.log(BIGRAM[a][b]) for a, b in pairs)
            rows.append((len(pairs), sum(self.sizes[b] for _, b in pairs), pytest.approx(nats, abs=1e-12)))
        return rows

    @pytest.mark.parametrize("rule", ["concatenate", "reset"])
    @pytest.mark.parametrize("protocol", [(1, 1), (7, 3), (100, 100), "carried"])
    def test_each_by_hand_and_all_of_them_are_the_total(self, rule, protocol):
        if protocol == "carried":
            result = evaluate_carried(bigram_model(), self.text, seq_len=9, documents=rule)
        else:
            context, stride = protocol
            result = evaluate(bigram_model(), self.text, context=context, stride=stride, documents=rule)
        parts = result.by_document
        assert [(p.tokens, p.bytes, p.nats) for p in parts] == self.expected(rule)
        assert [(p.title, p.words) for p in parts] == [(f"document {i}", n) for i, n in enumerate(self.words)]
        assert math.fsum(p.nats for p in parts) == result.nats
        assert sum(p.bytes for p in parts) == result.bytes
        assert sum(p.tokens for p in parts) == result.scored_tokens
        assert result.words == sum(self.words)
        assert parts[3].word_perplexity == pytest.approx(math.exp(parts[3].nats / 20))
        assert parts[3].bits_per_byte == pytest.approx(parts[3].nats / math.log(2) / parts[3].bytes)
        if rule == "reset":
            assert (parts[0].tokens, parts[0].bits_per_byte) == (0, None)

    @pytest.mark.parametrize("rule", ["concatenate", "reset"])
    def test_the_words_of_a_document_that_was_scored_in_part_are_not_known(self, rule):
        targets = {"concatenate": 39, "reset": 30 + 6}[rule]  # up to token 40, in the last document
        result = evaluate(bigram_model(), self.text, context=4, stride=4, documents=rule, max_tokens=targets)
        assert result.protocol.scored_range[1] == 40
        assert [(p.tokens, p.bytes, p.nats) for p in result.by_document] == self.expected(rule, 40)
        assert [p.words for p in result.by_document] == [1, 9, 1, None]
        assert (result.words, result.word_perplexity, result.by_document[3].word_perplexity) == (None, None, None)

    @pytest.mark.parametrize("rule", ["concatenate", "reset"])
    def test_whole_documents_have_their_words_though_the_split_was_scored_in_part(self, rule):
        targets = {"concatenate": 30, "reset": 29}[rule]  # up to the end of the second document
        result = evaluate(bigram_model(), self.text, context=4, stride=4, documents=rule, max_tokens=targets)
        assert not result.protocol.whole_split
        assert [p.words for p in result.by_document] == [1, 9]
        assert result.word_perplexity == pytest.approx(math.exp(result.nats / 10))

    def test_the_row_has_them_if_asked(self):
        result = evaluate(bigram_model(), self.text, context=4, stride=4, documents="reset")
        assert "by_document" not in result.to_json()
        rows = result.to_json(by_document=True)["by_document"]
        assert rows[0] == {
            "title": "document 0", "tokens": 0, "bytes": 0, "words": 1, "nats": 0,
            "bits_per_byte": None, "word_perplexity": 1,
        }  # fmt: skip
        assert [row["nats"] for row in rows] == [part.nats for part in result.by_document]

    def test_no_document_of_a_model_that_selects_ahead(self):
        result = evaluate(peeking_model(4), self.text, context=8, stride=8)
        assert result.by_document == result.by_block == ()


class TestByBlock:
    def text(self, sizes, tokens, documents=(0,)):
        generator = np.random.default_rng(2)
        return dataset_of(generator.integers(0, len(sizes), tokens), documents, sizes)

    @pytest.mark.parametrize("chunk", [1 << 20, 1000, 77])
    @pytest.mark.parametrize("sizes", [(1,), (1, 2, 3), (700, 900, 1000)])
    def test_a_token_belongs_to_the_block_of_its_first_byte(self, sizes, chunk, monkeypatch):
        monkeypatch.setattr(tally, "CHUNK", chunk)
        text = self.text(sizes, 3 * tally.BLOCK_BYTES // int(np.mean(sizes)) + 5)
        borders = tally.block_borders(text, len(text.tokens))
        before = [0, *np.cumsum([sizes[t] for t in text.tokens]).tolist()]
        block_of = [byte // tally.BLOCK_BYTES for byte in before[:-1]]
        expected = [block_of.index(number) for number in sorted(set(block_of))]
        whole = max(1, round(before[-1] / tally.BLOCK_BYTES))
        assert borders.tolist() == [*expected[:whole], len(text.tokens)]

    def test_the_rest_belongs_to_the_last_block(self):
        for more, blocks in [(0, 1), (30_000, 1), (40_000, 2)]:
            text = self.text((1,), tally.BLOCK_BYTES + more)
            assert len(tally.block_borders(text, len(text.tokens))) == blocks + 1

    def test_blocks_add_up_and_stand_in_for_few_documents_alone(self):
        tokens = 2 * tally.BLOCK_BYTES
        few = evaluate(bigram_model(), self.text((1, 2, 3), tokens, (0, 5)), context=4096, stride=4096)
        assert len(few.by_block) == 4
        assert math.fsum(block.nats for block in few.by_block) == pytest.approx(few.nats)
        assert sum(block.bytes for block in few.by_block) == few.bytes
        many = self.text((1, 2, 3), tokens, range(10))
        assert evaluate(bigram_model(), many, context=4096, stride=4096).by_block == ()
