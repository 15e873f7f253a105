"""The adapter for lm-evaluation-harness: beside a stand-in for it, and beside the real one where it is installed."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch.cli import main
from lmtrain.harness.requests import Requests, rolling_rows
from lmtrain.restore import open_run
from tests.lmtrain import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    assert main(["train", str(tiny.write(folder)), *tiny.settings(folder)]) == 0
    return folder / "run"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    """What the adapter needs of the harness: a base class and a register of names. Yields the register."""
    known: dict[str, type] = {}

    class LM:
        def __init__(self) -> None:
            self.cache_hook = None

    def register_model(*names: str):
        return lambda cls: known.update(dict.fromkeys(names, cls)) or cls

    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": register_model},
    }
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lmtrain.harness.adapter", raising=False)
    importlib.import_module("lmtrain.harness.adapter")
    yield known
    sys.modules.pop("lmtrain.harness.adapter", None)


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_answers_as_the_harness_asks(run: Path, stand_in: dict[str, Any]) -> None:
    lm = stand_in["lmtrain"](run=str(run), max_length=16, batch_size=1, device="cpu")
    plain = Requests(open_run(run), 16)
    pairs = [("the quick", " brown"), ("", "the")]
    assert lm.loglikelihood(asked(*pairs)) == [tuple(answer) for answer in plain.log_likelihoods(pairs)]
    assert lm.loglikelihood_rolling(asked(("the quick brown fox jumps",))) == plain.rolling(
        ["the quick brown fox jumps"]
    )
    prompt = ("the", {"until": ["."], "max_gen_toks": 5})
    assert lm.generate_until(asked(prompt)) == plain.continuations([prompt])


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lmtrain.harness.adapter", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lmtrain\[harness\]'"):
        importlib.import_module("lmtrain.harness.adapter")


@pytest.mark.parametrize("length", [1, 5, 8, 9, 23])
@pytest.mark.parametrize("context", [1, 4, 8])
def test_windows_are_those_of_the_real_one(length: int, context: int) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="needs lm_eval: pip install 'lmtrain[harness]'")
    ids = list(range(1, length + 1))
    theirs = list(utils.get_rolling_token_windows(ids, prefix_token=0, max_seq_len=context, context_len=1))
    ours = [
        (row.ids[:-1].tolist(), row.ids[-row.targets :].tolist())
        for row in rolling_rows(np.array([0]), np.array(ids), context)
    ]
    assert ours == theirs


TASKS = {
    "choice": """
task: choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: [" brown", " lazy"]
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "writing": """
task: writing
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""",
}


def test_tasks_of_the_real_one_run_on_a_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'lmtrain[harness]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import lmtrain.harness.adapter  # noqa: F401

    questions = [{"question": "the quick", "answer": 0}, {"question": "over the", "answer": 1}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(text + source)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(
        model="lmtrain",
        model_args=f"run={run},max_length=8",
        tasks=list(TASKS),
        task_manager=manager,
        bootstrap_iters=0,
    )
    plain = Requests(open_run(run), 8)
    likelihoods = plain.rolling([question["question"] for question in questions])
    size = sum(len(question["question"]) for question in questions)
    found = results["results"]
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(-sum(likelihoods) / size / np.log(2))
    right = 0
    for question in questions:
        choices = plain.log_likelihoods([(question["question"], word) for word in (" brown", " lazy")])
        right += int(np.argmax([answer.log_likelihood for answer in choices])) == question["answer"]
    assert found["choice"]["acc,none"] == right / 2
    assert "exact_match,none" in found["writing"]
