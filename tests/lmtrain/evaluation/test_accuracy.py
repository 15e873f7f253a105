"""Accuracy counts exact answers at the labels alone; of a model that selects ahead, from prefixes alone."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from data.tasks import TASKS, TaskDataset
from lmtrain.config import ModelConfig
from lmtrain.evaluation.accuracy import evaluate_task
from lmtrain.evaluation.evaluate import EvaluationStopped
from lmtrain.evaluation.recall import evaluate_recall, format_recall
from lmtrain.model import DecoderLM
from parallel.world import ALONE, World
from tests.processes import run_ranks

UNSCORED = -100
DATASET = TaskDataset(TASKS["mqar"](vocab_size=16, pairs=3), "test", 24)
PASSKEY = TaskDataset(TASKS["passkey"](digits=2), "test", 40)


def model(kind: str = "dense", vocab_size: int = 16, **settings: Any) -> DecoderLM:
    torch.manual_seed(0)
    mixer = {"kind": kind, "heads": 2, **settings}
    return DecoderLM(ModelConfig(dim=16, layers=2, mixers={"it": mixer}, pattern="it", vocab_size=vocab_size))


class Knowing(DecoderLM):
    """Says the answers of a dataset at every place but those that it is told to get wrong."""

    def __init__(self, dataset: TaskDataset, wrong: dict[int, int]) -> None:
        """wrong: example -> how many of its labels, from the first on, are answered wrongly."""
        vocabulary = dataset.task.vocab_size
        config = ModelConfig(
            dim=vocabulary, layers=1, mixers={"it": {"kind": "dense", "heads": 1}}, pattern="it", vocab_size=vocabulary
        )
        super().__init__(config)
        torch.nn.init.eye_(self.head.weight)  # type: ignore[union-attr]
        self.answers = {}
        for index, (tokens, labels) in enumerate(zip(*dataset.examples(0, 50), strict=True)):
            scored = np.flatnonzero(labels != UNSCORED)
            labels[scored[: wrong.get(index, 0)]] = 0
            self.answers[tuple(tokens)] = labels

    def hidden(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        labels = torch.from_numpy(np.stack([self.answers[tuple(row)] for row in tokens.tolist()]))
        said = torch.nn.functional.one_hot(labels.clamp(min=0), self.config.vocab_size)
        return type("Output", (), {"y": 5.0 * said})


def test_shares_of_labels_and_of_examples_by_hand() -> None:
    """Of 10 examples with 3 labels one misses 1 label, another all 3."""
    result = evaluate_task(Knowing(DATASET, {2: 1, 7: 3}), DATASET, examples=10, batch_tokens=100)
    assert (result.scored_tokens, result.right_tokens, result.accuracy) == (30, 26, 26 / 30)
    assert (result.examples, result.right_examples, result.example_accuracy) == (10, 8, 0.8)
    others = 15 * math.exp(0)
    right, wrong = math.exp(5) / (math.exp(5) + others), 1 / (math.exp(5) + others)
    assert result.loss == pytest.approx(-(26 * math.log(right) + 4 * math.log(wrong)) / 30)
    shares = [1.0] * 8 + [2 / 3, 0.0]
    assert result.standard_error == pytest.approx(np.std(shares, ddof=1) / math.sqrt(10))
    row = result.row()
    assert (row["bits_per_byte"], row["stride"], row["context"], row["scoring"]) == (None, None, 24, "one-pass")


def test_batches_change_nothing() -> None:
    results = [evaluate_task(model(), DATASET, examples=20, batch_tokens=size) for size in (1, 24 * 7, 10**6)]
    assert len({(result.right_tokens, result.right_examples) for result in results}) == 1
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)


def test_what_selects_ahead_answers_from_the_prefix_alone() -> None:
    """Against one forward pass for each question; one pass over whole examples says something else."""
    ahead = model("mosa", head_dim=8, keep=2, selection="paper").eval()
    result = evaluate_task(ahead, DATASET, examples=30)
    tokens, labels = map(torch.from_numpy, DATASET.examples(0, 30))
    right, nats, claimed = 0, 0.0, 0
    with torch.no_grad():
        for row, place in (labels != UNSCORED).nonzero().tolist():
            logits, label = ahead(tokens[row : row + 1, : place + 1])[0, -1], labels[row, place]
            right += int(logits.argmax() == label)
            nats -= float(logits.log_softmax(-1)[label])
            claimed += int(ahead(tokens[row : row + 1])[0, place].argmax() == label)
    assert result.scoring == "prefix-wise"
    assert result.right_tokens == right
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.one_pass == claimed / 90
    assert result.row()["one_pass_accuracy"] == result.one_pass


def test_prefixes_of_a_strict_model_say_what_its_one_pass_says(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = model()
    expected = evaluate_task(strict, DATASET, examples=20)
    monkeypatch.setattr(DecoderLM, "causality", "selects_ahead")
    result = evaluate_task(strict, DATASET, examples=20)
    assert (result.right_tokens, result.one_pass) == (expected.right_tokens, expected.accuracy)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)


def test_questions_of_what_selects_ahead_are_limited() -> None:
    ahead = model("mosa", head_dim=8, keep=2, selection="paper")
    assert evaluate_task(ahead, DATASET, examples=100, prefixes=12).examples == 4
    assert evaluate_task(ahead, DATASET, examples=100, prefixes=1).examples == 1


def test_a_stop_is_asked_for_between_batches() -> None:
    with pytest.raises(EvaluationStopped):
        evaluate_task(model(), DATASET, examples=5, should_stop=lambda: True)


def test_examples_longer_than_the_table_of_positions_are_refused() -> None:
    config = ModelConfig(
        dim=16, layers=1, mixers={"it": {"kind": "dense", "rotary": 0}}, pattern="it", vocab_size=16,
        learned_positions=20,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"24 tokens are more than the 20 of model\.learned_positions"):
        evaluate_task(DecoderLM(config), DATASET, examples=1)


def asked(world: World, kind: dict[str, Any]) -> tuple[int, int, float]:
    result = evaluate_task(model(**kind), DATASET, examples=9, batch_tokens=48, world=world)
    return result.right_tokens, result.right_examples, result.nats


@pytest.mark.parametrize("kind", [{}, {"kind": "mosa", "head_dim": 8, "keep": 2, "selection": "paper"}])
def test_two_ranks_are_one_process(kind: dict[str, Any]) -> None:
    """Five batches: the second rank has none in the last round."""
    assert run_ranks(2, asked, kind) == [asked(ALONE, kind)] * 2


def test_passkeys_are_asked_at_each_depth_and_length() -> None:
    result = evaluate_recall(model(vocab_size=256), PASSKEY, [24, 40], examples=7)
    row = result.to_json({"step": 3})
    assert row["corpus"] == "passkey-d2-t24+40"
    cells = row["grid"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [
        (length, depth) for length in (24, 40) for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert row["examples"] == 70
    assert row["scored_tokens"] == 140
    assert row["accuracy"] == pytest.approx(np.mean([cell["accuracy"] for cell in cells]))
    assert row["loss"] == pytest.approx(np.mean([cell["loss"] for cell in cells]))
    alone = TaskDataset(TASKS["passkey"](digits=2, depth=0.25), "test", 24)
    assert cells[1]["loss"] == pytest.approx(evaluate_task(model(vocab_size=256), alone, examples=7).loss)
    text = format_recall(result)
    assert "depth 0.25" in text
    assert len(text.splitlines()) == 6


def test_one_example_has_no_standard_error_and_json_no_nan() -> None:
    row = evaluate_recall(model(vocab_size=256), PASSKEY, [24], examples=1).to_json()
    assert row["accuracy_standard_error"] is None
    assert [cell["accuracy_standard_error"] for cell in row["grid"]] == [None] * 5
    json.dumps(row, allow_nan=False)


def test_one_length_of_one_task_has_no_grid() -> None:
    result = evaluate_recall(model(), DATASET, [24], examples=3)
    row = result.to_json()
    assert "grid" not in row
    assert (row["corpus"], row["fingerprint"]) == ("mqar-v16-k3-t24", DATASET.fingerprint)
    assert (row["bits_per_byte"], row["words"], row["bytes"]) == (None, None, None)
    assert row["settings"] == {"vocab_size": 16, "pairs": 3}


def test_an_impossible_length_is_told_before_any_is_asked() -> None:
    with pytest.raises(ValueError, match="11 tokens holds at most 2 pairs"):
        evaluate_recall(model(), DATASET, [24, 11])
