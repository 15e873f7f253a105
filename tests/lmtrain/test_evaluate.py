"""Scoring: hand-computed numbers, every target once, whatever the windows and batches; leaks are named."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lmtrain.evaluate as evaluate_module
from attention.mixer import Context, Cost, Mixer, MixerOutput
from data.dataset import TokenDataset
from lmtrain.config import ModelConfig
from lmtrain.evaluate import EvaluationStopped, evaluate, evaluate_carried, format_result, write_result
from lmtrain.loss import token_losses
from lmtrain.model import DecoderLM

BIGRAM = [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [1 / 4, 1 / 2, 1 / 4]]
PROTOCOLS = [(1, 1), (2, 1), (4, 4), (5, 3), (8, 1), (64, 16), (64, 64), (1000, 1000), (1000, 7)]


def dataset_of(tokens, documents=(0,), token_bytes=(1, 2, 3), words=4) -> TokenDataset:
    """A split whose tokens have the given sizes in bytes."""
    sizes = np.array(token_bytes, dtype=np.int64)
    tokenizer = SimpleNamespace(name="toy", vocab_size=len(sizes), token_bytes=sizes)
    tokens = np.array(tokens, dtype=np.uint8)
    starts = np.array([*documents, len(tokens)], dtype=np.int64)
    of_document = np.add.reduceat(sizes[tokens], starts[:-1])
    words_of = np.array([words, *[0] * (len(documents) - 1)])
    titles = [f"document {index}" for index in range(len(documents))]
    return TokenDataset(tokens, starts, "f1", tokenizer, "toy corpus", "validation", of_document, words_of, titles)


def random_dataset(length: int, vocabulary: int = 3, documents=(0,), seed: int = 0) -> TokenDataset:
    generator = np.random.default_rng(seed)
    return dataset_of(generator.integers(0, vocabulary, length), documents, generator.integers(1, 5, vocabulary))


def bigram_model(table=BIGRAM) -> DecoderLM:
    """p(next | token) is the token's row of the table: one-hot embedding, no layers, logarithms as head."""
    p = torch.tensor(table, dtype=torch.float64)
    model = DecoderLM(ModelConfig(dim=len(p), layers=0, vocab_size=len(p))).double()
    model.norm = nn.Identity()
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(len(p)))
        model.head.weight.copy_(p.log().T)
    return model


def decoder(pattern: str, vocabulary: int = 3, seed: int = 0, **settings: Any) -> DecoderLM:
    """A small model in float64, with every matrix large enough that attention matters."""
    torch.manual_seed(seed)
    mixers = {
        "near": {"kind": "local", "heads": 2, "window": 3},
        "far": {"kind": "local", "heads": 2, "kv_heads": 1, "window": 5},
        "five": {"kind": "local", "heads": 2, "window": 5},
        "all": {"kind": "dense", "heads": 2},
    }
    sizes = {"dim": 8, "layers": 2, "ffn_dim": 8, "init_std": 0.7}
    config = ModelConfig(mixers=mixers, pattern=pattern, vocab_size=vocabulary, **(sizes | settings))
    return DecoderLM(config).double()


class Peek(Mixer):
    """Leaks on purpose: writes the next token, if there is one, into the second half of the features."""

    causality = "selects_ahead"

    def forward(self, x: Tensor, ctx: Context | None = None, state: Any = None) -> MixerOutput:
        half = x.shape[2] // 2
        following = torch.cat([x[:, 1:, :half], torch.zeros_like(x[:, :1, :half])], 1)
        return MixerOutput(torch.cat([torch.zeros_like(following), following], 2), {})

    def init_state(self, batch: int, limit: int | None = None) -> Any:
        raise AssertionError("its selection needs the whole sequence")

    def cost(self, length: int) -> Cost:
        return Cost(0, 0, 0, 0)


def peeking_model(vocabulary: int) -> DecoderLM:
    """Knows the next token for certain wherever there is one in its input, else nothing at all."""
    model = decoder("near", vocabulary, dim=2 * vocabulary, layers=1, ffn_dim=1)
    block = model.blocks[0]
    block.mixers = nn.ModuleDict({"peek": Peek()})
    block.mixer_norm = model.norm = nn.Identity()
    with torch.no_grad():
        for parameter in block.ffn.parameters():
            parameter.zero_()
        identity = torch.eye(vocabulary)
        model.embedding.weight.copy_(torch.cat([identity, torch.zeros_like(identity)], 1))
        model.head.weight.copy_(torch.cat([torch.zeros_like(identity), 100 * identity], 1))
    return model


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

    @pytest.mark.parametrize("pattern", ["far", "near+far", "near far"])
    def test_sliding_is_carried_where_the_context_reaches_all_that_a_token_can_see(self, pattern):
        """Two layers of windows 5 reach back 8 tokens; at context 13, stride 5 each sees 9 at least."""
        model = decoder(pattern)
        sliding = evaluate(model, self.dataset, context=13, stride=5)
        carried = evaluate_carried(model, self.dataset, seq_len=7)
        assert sliding.nats == pytest.approx(carried.nats, abs=1e-10)
        shorter = evaluate(model, self.dataset, context=8, stride=8)
        assert abs(shorter.nats - carried.nats) > 1e-3

    @pytest.mark.parametrize("stride", [5, 32])
    def test_batch_size_does_not_change_the_number(self, stride):
        model = decoder("near+all")
        alone, together = (
            evaluate(model, self.dataset, context=32, stride=stride, batch_tokens=tokens) for tokens in (1, 10**6)
        )
        assert alone.nats == pytest.approx(together.nats, abs=1e-12 * 299)
        assert replace(alone, nats=0, by_position=()) == replace(together, nats=0, by_position=())

    def test_only_scored_positions_go_through_the_head_and_no_more_than_asked(self, monkeypatch):
        rows = []

        def counted(hidden, weight, labels):
            rows.append(len(hidden))
            return token_losses(hidden, weight, labels)

        monkeypatch.setattr(evaluate_module, "token_losses", counted)
        evaluate(decoder("near"), self.dataset, context=32, stride=2)
        assert sum(rows) == 299
        rows.clear()
        evaluate(decoder("near"), self.dataset, context=32, stride=32, batch_tokens=100)
        assert rows == [96, 96, 96, 11]


class TestPartAndDocuments:
    @pytest.mark.parametrize("max_tokens", [1, 15, 16, 17, 40])
    def test_max_tokens_is_the_beginning_alone(self, max_tokens):
        model, dataset = decoder("near+far"), random_dataset(100)
        part = evaluate(model, dataset, context=16, stride=8, max_tokens=max_tokens)
        beginning = replace(dataset, tokens=dataset.tokens[: max_tokens + 1])
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
        parts = [score(replace(dataset, tokens=dataset.tokens[a:b])) for a, b in [(1, 31), (31, 33), (33, 80)]]
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


class TestReport:
    def test_row(self):
        result = evaluate(bigram_model(), TestNumbers.dataset, context=4, stride=2)
        row = result.to_json("runs/x/checkpoints/step-7", 7)
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
        row = evaluate_carried(bigram_model(), TestNumbers.dataset, seq_len=2).to_json()
        assert (row["context"], row["stride"], row["scoring"], row["carry"]) == (None, None, "carried", 8)

    def test_file(self, tmp_path):
        result = evaluate(bigram_model(), TestNumbers.dataset, context=4, stride=2)
        path = write_result(tmp_path, result, checkpoint=tmp_path / "checkpoints/step-7", step=7)
        assert path == tmp_path / "eval/toy_corpus-validation-f1-context4-stride2-step7.json"
        assert json.loads(path.read_text()) == result.to_json(tmp_path / "checkpoints/step-7", 7)
        part = evaluate_carried(bigram_model(), TestNumbers.dataset, seq_len=2, max_tokens=3)
        assert write_result(tmp_path, part).name == "toy_corpus-validation-f1-carry8-first3.json"
        assert {file.name for file in path.parent.iterdir()} == {
            "toy_corpus-validation-f1-context4-stride2-step7.json",
            "toy_corpus-validation-f1-carry8-first3.json",
        }

    def test_text_says_the_protocol_beside_the_number(self):
        text = format_result(evaluate(bigram_model(), TestNumbers.dataset, context=4, stride=2))
        assert "toy corpus validation: 0.8889 bits per byte (one-pass, strict)" in text
        assert "5 tokens, 9 bytes, 4 words, the whole split but the first token" in text
        assert "windows of 4, 2 new ones each: a token sees from 3" in text
        disjoint = format_result(evaluate(bigram_model(), TestNumbers.dataset, context=4, stride=4, max_tokens=2))
        assert "disjoint windows: a token sees from 1 to 4" in disjoint
        assert "the beginning of the split" in disjoint
        assert "per word" not in disjoint
        carried = format_result(evaluate_carried(bigram_model(), TestNumbers.dataset, seq_len=2))
        assert "state carried, nothing read twice; no key outlives 8 tokens" in carried
