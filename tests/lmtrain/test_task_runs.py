"""Runs on synthetic tasks, from the configuration to the answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tasks import TASKS, TaskDataset
from launch.cli import main
from lmtrain import checkpoint
from lmtrain.config import ConfigError, ModelConfig, load, shipped_configs
from lmtrain.model import DecoderLM
from lmtrain.run import read_metrics
from lmtrain.setup import CHECKS
from lmtrain.train import DONE, train
from parallel.world import World
from tests.lmtrain.test_train import assert_same
from tests.lmtrain.tiny import SHORT
from tests.processes import run_ranks

SHIPPED = [name for name in shipped_configs() if name.startswith("recall/")]
CONFIG = f"""
data: {{corpus: mqar, seq_len: 32, task: {{vocab_size: 16, pairs: 3}}}}
{SHORT}
model:
  dim: 16
  layers: 2
  mixers: {{it: {{kind: dense, heads: 2}}}}
  pattern: it
"""


def settings(folder: Path, *overrides: str) -> tuple[Path, list[str]]:
    """A small configuration in the folder, and where its run goes."""
    path = folder / "small.yaml"
    path.write_text(CONFIG)
    return path, [f"run.dir={folder}/run", *overrides]


def config(folder: Path, *overrides: str) -> Any:
    path, words = settings(folder, *overrides)
    return load(path, words, checks=CHECKS)


def problems(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        config(folder, *overrides)
    return str(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on associative recall."""
    folder = tmp_path_factory.mktemp("recall")
    assert train(config(folder)) == DONE
    return folder / "run"


@pytest.fixture(scope="module")
def passkey_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on passkeys."""
    folder = tmp_path_factory.mktemp("passkey")
    path, words = settings(folder)
    path.write_text(CONFIG.replace("mqar", "passkey").replace("vocab_size: 16, pairs: 3", "digits: 2"))
    assert train(load(path, [*words, "train.steps=2"], checks=CHECKS)) == DONE
    return folder / "run"


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("mixer", ["{kind: dense, heads: 2}", "{kind: mosa, heads: 2, head_dim: 32, keep: 16}"])
def test_every_shipped_task_trains(name: str, mixer: str, tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path}/run", f"model.mixers.it={mixer}", "train.steps=3", "eval.tokens=512"]
    assert train(load(name, words, checks=CHECKS)) == DONE
    (row,) = [row for row in read_metrics(tmp_path / "run") if "split" in row]
    assert 0 <= row["accuracy"] <= 1
    assert row["bits_per_byte"] is None


def test_all_four_tasks_are_shipped() -> None:
    assert set(SHIPPED) == {f"recall/{name}" for name in ("mqar", "induction", "selective_copy", "passkey")}


def test_dense_attention_learns_induction(tmp_path: Path, one_thread: None) -> None:
    """Of 31 symbols nobody guesses more than a few per cent of a text that was not seen before."""
    words = [f"run.dir={tmp_path}/run", "data.seq_len=64", "data.task.vocab_size=32", "train.batch_tokens=2048"]
    assert train(load("recall/induction", [*words, "train.steps=100"], checks=CHECKS)) == DONE
    after = [row["accuracy"] for row in read_metrics(tmp_path / "run") if "split" in row][-1]
    assert after > 0.99


def test_rows_of_a_task(run: Path) -> None:
    rows = [row for row in read_metrics(run) if "split" in row]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert {(row["split"], row["examples"], row["scored_tokens"]) for row in rows} == {("validation", 8, 24)}
    assert (rows[0]["context"], rows[0]["stride"], rows[0]["scoring"]) == (32, None, "one-pass")


def test_a_resumed_run_is_the_undisturbed_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmtrain.fault.before_update", _fail_at(7))
    with pytest.raises(RuntimeError, match="at 7"):
        train(config(tmp_path))
    monkeypatch.undo()
    assert train(config(tmp_path)) == DONE
    assert_same(tmp_path / "run", run)


def _fail_at(step: int) -> Any:
    def fail(now: int) -> None:
        if now == step:
            raise RuntimeError(f"at {step}")

    return fail


def work(world: World, folder: Path, words: list[str]) -> int:
    words = [f"run.dir={folder}/two", *words]
    return train(load(folder / "small.yaml", words, ranks=world.size), world=world)


@pytest.mark.parametrize(("sequence", "words"), [(1, ["train.micro_batch=1"]), (2, ["parallel.sequence=2"])])
def test_two_ranks_read_and_answer_what_one_process_does(
    run: Path, tmp_path: Path, sequence: int, words: list[str]
) -> None:
    settings(tmp_path)
    assert run_ranks(2, work, tmp_path, words, sequence=sequence) == [DONE] * 2
    rows, expected = read_metrics(tmp_path / "two"), read_metrics(run)
    assert [row.get("batch") for row in rows] == [row.get("batch") for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        assert row.get("accuracy") == wanted.get("accuracy")


def test_a_checkpoint_of_another_task_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belongs to other data"):
        train(config(tmp_path, "data.task.pairs=4"), resume=run / "checkpoints/step-8")
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_fork_may_draw_other_examples(run: Path, tmp_path: Path) -> None:
    assert train(config(tmp_path, "run.seed=5"), resume=run / "checkpoints/step-8") == DONE
    assert checkpoint.load(tmp_path / "run/checkpoints/step-12").state["parent"] == str(run / "checkpoints/step-8")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.task={pairs: 9, vocab_size: 64}"],
            "data.task.pairs=9: an example of 32 tokens holds at most 8 pairs with their queries",
        ),
        (["data.task.vocab_size=6"], "data.task.pairs=3: a vocabulary of 6 has keys for at most 2 pairs"),
        (["data.seq_len=8", "train.batch_tokens=64"], "an example of 8 tokens holds at most 2 pairs"),
        (["data.task.pears=3"], "no such setting of mqar; did you mean pairs? (vocab_size, pairs)"),
        (["data.task.pairs=0"], "data.task.pairs=0: must be >= 1"),
        (["data.task=3"], "data.task=3: must be a mapping"),
        (["data.stream=true"], "data.stream=true: no example of mqar goes on from another"),
        (["data.tokenizer=bytes"], "has no effect with data.corpus mqar: a synthetic task has tokens of its own"),
        (["data.documents=reset"], "each example of a synthetic task stands alone"),
        (["data.path=x"], "data.path=x: has no effect with data.corpus mqar"),
        (["data.validation=0.2"], "data.validation=0.2: has no effect with data.corpus mqar"),
        (["eval.stride=3"], "the examples of a synthetic task are scored whole"),
        (["model.vocab_size=10"], "model.vocab_size=10: less than the 16 tokens of mqar"),
    ],
)
def test_each_mistake_in_words(tmp_path: Path, overrides: list[str], words: str) -> None:
    told = problems(tmp_path, *overrides)
    assert words in told
    assert told.endswith("1 problem; nothing was started.")


def test_settings_of_a_task_mean_nothing_to_a_text(tmp_path: Path) -> None:
    path, words = settings(tmp_path, "data.task.pairs=3")
    path.write_text(CONFIG.replace("corpus: mqar", "corpus: stdlib"))
    with pytest.raises(ConfigError, match=r"data\.task.*has no effect with data\.corpus stdlib"):
        load(path, words)


def test_settings_of_a_task_that_the_command_line_gives_to_a_text_are_told(tmp_path: Path) -> None:
    """Those of the file go with its corpus, those beside the other corpus are a mistake."""
    path, words = settings(tmp_path)
    text = [*words, "data.corpus=text", f"data.path={path}"]
    assert load(path, text).data.task == {}
    for word in ("data.task.pairs=2", "data.task={pairs: 2}"):
        with pytest.raises(ConfigError) as error:
            load(path, [*text, word])
        told = str(error.value)
        assert "command line  data.task.pairs=2: has no effect with data.corpus text: only a synthetic task" in told
        assert "1 problem" in told


def test_defaults_of_a_task_are_kept_with_the_run(tmp_path: Path) -> None:
    path, words = settings(tmp_path)
    path.write_text(CONFIG.replace(", task: {vocab_size: 16, pairs: 3}", "").replace("seq_len: 32", "seq_len: 64"))
    assert load(path, words).data.task == {"vocab_size": 256, "pairs": 16}


def test_eval_answers_in_one_object_and_keeps_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--on", "mqar:test", "--examples", "5", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["corpus"], row["split"], row["examples"]) == ("mqar-v16-k3-t32", "test", 5)
    assert (row["scored_tokens"], row["bits_per_byte"], row["step"]) == (15, None, 12)
    assert row in [json.loads(path.read_text()) for path in (run / "eval").glob("mqar*test*.json")]
    assert main(["eval", str(run)]) == 0
    assert "mqar-v16-k3-t32 validation: accuracy" in capsys.readouterr().out
    assert main(["eval", str(run), "--length", "32,64", "--examples", "2", "--json"]) == 0
    assert [cell["length"] for cell in json.loads(capsys.readouterr().out)["grid"]] == [32, 64]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_eval_draws_a_heat_map(
    passkey_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    picture = tmp_path / f"map.{ending}"
    words = ["eval", str(passkey_run), "--length", "32,48", "--examples", "2", "--plot", str(picture)]
    assert main(words) == 0
    assert "depth 0.5" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--on", "passkey"], "--on passkey: its tokens are bytes, those of this model numbers"),
        (["--on", "induction"], "--on induction: has 64 tokens, the model knows 16"),
        (["--on", "mqar:all"], "corpus mqar has no split 'all'; it has train, validation, test"),
        (["--length", "8"], "an example of 8 tokens holds at most 2 pairs"),
        (["--stride", "3", "--carry"], "--stride, --carry: for texts only"),
        (["--prefixes", "3"], "this model is strict"),
        (["--plot", "map.pdf"], "ends in .svg or .png"),
    ],
)
def test_what_eval_refuses(run: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert main(["eval", str(run), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("on", [[], ["--on", "mqar"], ["--on", "mqar:test"]])
def test_compare_says_that_examples_are_no_text(
    run: Path, capsys: pytest.CaptureFixture[str], on: list[str], tmp_path: Path
) -> None:
    assert main(["compare", str(run), str(run), *on]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{run}: mqar is a synthetic task, and texts are compared; lmtrain eval RUN --on mqar of each run" in said
    assert main(["eval", str(run), "--examples", "4"]) == 0
    kept = capsys.readouterr().err.strip().removeprefix("kept in ")
    assert main(["compare", kept, str(run)]) == 2
    assert f"{kept}: mqar is a synthetic task" in capsys.readouterr().err


def test_generate_writes_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prompt", "1 9 2 8", "--length", "3", "--seed", "1"]) == 0
    assert all(int(word) < 16 for word in capsys.readouterr().out.removeprefix("1 9 2 8").split())
    assert main(["generate", str(run)]) == 2
    assert "the tokenizer numbers finds no token in it" in capsys.readouterr().err
    assert main(["generate", str(run), "--prompt", "1 99"]) == 2
    assert "'99' is no number of a token" in capsys.readouterr().err


def test_a_gap_puts_the_first_copy_out_of_the_reach_of_windows() -> None:
    """Two layers with windows of 8 see 14 tokens back, and what answers stands 41 back: another one changes nothing."""
    texts = torch.from_numpy(TaskDataset(TASKS["induction"](vocab_size=16, gap=20), "test", 64).examples(0, 4).tokens)
    other = texts.clone()
    other[:, :22] = 1 + texts[:, :22] % 15  # no symbol stays what it was
    for mixer, blind in (({"kind": "local", "window": 8}, True), ({"kind": "dense"}, False)):
        torch.manual_seed(0)
        parts = {"mixers": {"it": {**mixer, "heads": 2}}, "pattern": "it"}
        model = DecoderLM(ModelConfig(dim=16, layers=2, vocab_size=16, **parts)).double()
        with torch.no_grad():
            same = torch.equal(model(texts)[:, 42:], model(other)[:, 42:])
        assert same == blind
