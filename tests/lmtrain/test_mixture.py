"""A run on a mixture: the configuration says which texts, training reads all, each is validated by itself."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtrain.config import Config, ConfigError, load
from lmtrain.config.mixture import ingredients
from lmtrain.prepare import prepare
from lmtrain.progress import Progress
from lmtrain.setup import build_data, check_data, make_loader, read_split
from lmtrain.train import train

MIXTURE = "{one: {corpus: text, path: %s, weight: 1}, two: {corpus: jsonl, path: %s, column: body, weight: 3}}"


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two texts, of small and of capital letters."""
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("lower case " * 300)
    rows = [json.dumps({"body": "UPPER CASE " * 30 + str(number)}) for number in range(30)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    return MIXTURE % (tmp_path / "a.txt", tmp_path / "b.jsonl")


def configured(tmp_path: Path, mixture: str, *overrides: str) -> Config:
    small = ["data.seq_len=32", "train.batch_tokens=256", "train.steps=4", "eval.tokens=64", "eval.every=2"]
    model = ["model.dim=16", "model.layers=1", "model.pattern=near", "model.mixers.near={kind: local, heads: 1}"]
    run = [f"run.dir={tmp_path / 'run'}", "data.corpus=mixture", f"data.mixture={mixture}"]
    return load("demo", [*small, *model, *run, *overrides], checks=[check_data])


def test_training_reads_each_text_by_its_weight_and_validates_each(tmp_path: Path, mixture: str) -> None:
    config = configured(tmp_path, mixture)
    data = build_data(config)
    assert [dataset.corpus for dataset in data.validation] == ["one (text)", "two (jsonl)"]
    loader = make_loader(config, data.train)
    rows = [bytes(row) for first in (0, 8, 16) for batch in loader.step(first) for row in batch.tokens.tolist()]
    assert sum(row.islower() for row in rows) == 6
    assert sum(row.isupper() for row in rows) == 18

    assert train(config) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scored = [(row["step"], row["corpus"]) for row in metrics if "split" in row]
    assert scored == [(step, corpus) for step in (2, 4) for corpus in ("one (text)", "two (jsonl)")]


def test_other_shares_are_another_text_to_a_run_that_resumes(tmp_path: Path, mixture: str) -> None:
    data = build_data(configured(tmp_path, mixture))
    other = build_data(configured(tmp_path, mixture.replace("weight: 3", "weight: 2")))
    same = build_data(configured(tmp_path, mixture.replace("weight: 1", "weight: 2").replace("weight: 3", "weight: 6")))
    assert data.train.fingerprint == same.train.fingerprint != other.train.fingerprint


def test_one_text_is_scored_by_its_name(tmp_path: Path, mixture: str) -> None:
    config = configured(tmp_path, mixture)
    data = build_data(config)
    scored = read_split(config, data.tokenizer, "two:validation", None)
    assert np.array_equal(scored.tokens, data.validation[1].tokens)
    with pytest.raises(ValueError, match=r"a mixture is no text, name one of its own: one, two"):
        read_split(config, data.tokenizer, None, None)


def test_the_texts_are_prepared_with_the_tokenizer_of_all(tmp_path: Path, mixture: str) -> None:
    config = configured(tmp_path, mixture, "data.tokenizer=characters")
    prepared = prepare(config, workers=1, progress=Progress(io.StringIO()))
    assert list(prepared.splits) == [f"{text}:{split}" for text in ("one", "two") for split in ("train", "validation")]
    characters = set("lower case UPPER CASE 0123456789")
    assert prepared.tokenizer.vocab_size == len(characters)
    data = build_data(config)
    assert prepared.splits["two:validation"][1].fingerprint == data.validation[1].fingerprint


def test_a_short_form_and_settings_as_they_are_written() -> None:
    found = ingredients({"pg19": 0.7, "mine": {"corpus": "text", "path": 1914, "validation": 0.2, "weight": 1}})
    assert (found["pg19"].corpus, found["pg19"].weight, found["pg19"].settings) == ("pg19", 0.7, {})
    assert (found["mine"].corpus, found["mine"].settings) == ("text", {"path": "1914", "validation": "0.2"})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "the corpus mixture needs its texts and their weights"),
    ({"pg19": "much"}, "pg19: must be a weight, or a mapping"),
    ({"pg19x": 1}, r"pg19x\.corpus: no corpus 'pg19x'; did you mean pg19\?"),
    ({"pg19": 0}, r"pg19\.weight: must be a number > 0"),
    ({"pg19": {"path": "x"}}, r"pg19\.weight: must be a number > 0"),
    (
        {"a": {"corpus": "text", "weight": 1, "column": "x"}},
        r"a\.column: no such setting of text \(weight, path, valida",
    ),
    ({"iid": {"weight": 1, "alphabet": "four"}}, r"iid\.alphabet: must be a whole number"),
    ({"pg19": -1, "b": {"corpus": "nine", "weight": 1}}, r"pg19\.weight: .*; b\.corpus: no corpus 'nine'"),
]


@pytest.mark.parametrize(("mixture", "message"), WRONG)
def test_all_that_is_wrong_is_told_at_once(mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ingredients(mixture)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mixture.one.weight=0"], r"data\.mixture.*one\.weight: must be a number > 0"),
        (["data.mixture.one.path=nowhere"], r"data\.mixture\.one.*no file 'nowhere'"),
        (["data.stream=true"], "the texts of a mixture do not go on from each other"),
        (["data.path=here"], r"data\.path=here: has no effect with data\.corpus mixture"),
        (["data.corpus=stdlib"], r"data\.mixture.*has no effect with data\.corpus stdlib"),
        (["data.seq_len=4096", "train.batch_tokens=4096"], "the train split of text has .* tokens, at least 4097"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    tmp_path: Path, mixture: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(tmp_path, mixture, *overrides)
