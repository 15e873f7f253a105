"""The command as its users type it: what it prints, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main, parse
from tests.lmtrain import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("cli")
    path = tiny.write(folder)
    assert main(["train", str(path), *tiny.settings(folder)]) == 0
    return folder / "run"


def test_overrides_may_stand_before_and_behind_options() -> None:
    arguments = parse(["train", "demo", "a=1", "--fresh", "b.c={d: 1}", "--resume", "x"])
    assert arguments.overrides == ["a=1", "b.c={d: 1}"]
    assert arguments.resume == Path("x")


@pytest.mark.parametrize("argv", [[], ["fly"], ["train"], ["train", "demo", "--speed"], ["list", "--length", "0"]])
def test_a_command_that_makes_no_sense_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb",
    [
        *("train", "prepare", "eval", "compare", "generate", "inspect", "audit", "list", "bench", "checkpoint"),
        *("launch", "sweep", "report"),
    ],
)
def test_every_verb_shows_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    examples = capsys.readouterr().out.split("examples:")[1]
    assert examples.count(f"lmtrain {verb}") >= 2


def test_all_mistakes_at_once_and_nothing_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path)
    wrong = ["train.stepz=3", "model.mixers.near.window=0", "data.path=nowhere.txt", "model.mixers.far.heads=3"]
    assert main(["train", str(path), *tiny.settings(tmp_path), *wrong]) == 2
    said = capsys.readouterr().err
    for words in ("train.stepz", "did you mean", "window", "nowhere.txt", "heads 3 does not divide dim 16"):
        assert words in said
    assert "4 problems; nothing was started." in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.pattern=near middle"], "middle"),
        (["model.mixers.near.kind=lokal"], "did you mean local?"),
        (["model.mixers.near.kv_heads=3"], "kv_heads 3 does not divide heads 2"),
        (["train.batch_tokens=100"], "nearest"),
        (["train.steps=many"], "train.steps"),
        (["data.seq_len=100000", "train.batch_tokens=100000"], "at least 100001 are needed"),
        (["model.vocab_size=100"], "256"),
        (["checkpoint.keep=100000"], "disk too small"),
    ],
)
def test_each_mistake_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    big = ["model.dim=4096", "model.layers=16"] if "disk" in words else []
    path = tiny.write(tmp_path)
    assert main(["train", str(path), *tiny.settings(tmp_path), *overrides, *big]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_empty_text_and_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    assert main(["train", str(path), *tiny.settings(tmp_path, f"data.path={tmp_path}/empty.txt")]) == 2
    assert "empty" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    assert main(["train", str(path), *tiny.settings(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir() if file.name != "lock"] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    assert main(["train", str(path), *tiny.settings(tmp_path, f"run.dir={tmp_path}/file")]) == 2
    assert "run.dir" in capsys.readouterr().err


@pytest.mark.fault(13)
def test_a_folder_that_another_process_is_writing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lmtrain.run import RunDirectory

    with RunDirectory.open(run):
        code = subprocess.run(
            [sys.executable, "-m", "lmtrain", "train", str(run.parent / "tiny.yaml"), *tiny.settings(run.parent)],
            capture_output=True,
            text=True,
        )
    assert code.returncode == 2
    assert str(os.getpid()) in code.stderr


def test_eval_prints_one_json_object_and_keeps_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--context", "16", "--stride", "4", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    names = (
        "corpus split bits_per_byte token_perplexity word_perplexity scored_tokens bytes words context stride scoring"
    )
    for name in [*names.split(), "causality", "fingerprint", "checkpoint"]:
        assert name in row
    assert (row["context"], row["stride"], row["scoring"]) == (16, 4, "one-pass")
    assert [json.loads(path.read_text()) for path in (run / "eval").glob("*context16*.json")] == [row]


def test_eval_of_a_file_and_with_carried_state(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_bytes(b"the lazy dog jumps over the quick brown fox. " * 20)
    assert main(["eval", str(run), "--on", "text:all", "--path", f"{tmp_path}/other.txt", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["split"], row["scored_tokens"], row["bytes"]) == ("all", 899, 899)
    assert main(["eval", str(run), "--carry", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["scoring"], row["context"], row["stride"]) == ("carried", None, None)
    assert main(["eval", str(run), "--carry", "--stride", "3"]) == 2
    assert main(["eval", str(run), "--on", "text:test", "--path", f"{tmp_path}/other.txt"]) == 2
    assert "has no split 'test'" in capsys.readouterr().err


def test_a_published_selection_from_training_to_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path)
    paper = "model.mixers.far={kind: mosa, heads: 2, head_dim: 8, keep: 4, selection: paper}"
    settings = tiny.settings(tmp_path, paper, "train.steps=2")
    run = str(tmp_path / "run")
    assert main(["train", str(path), *settings]) == 0
    assert main(["audit", run]) == 0
    assert "selects ahead, as configured" in capsys.readouterr().out
    assert main(["eval", run, "--prefixes", "40"]) == 0
    said = capsys.readouterr()
    assert "one pass (leaks)  prefix-wise" in said.out
    assert "far is mosa with heads 2, head_dim 8, keep 4: the numbers of the config" in said.out
    assert main(["eval", run, "--prefixes", "40", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["one_pass_bits_per_byte"] + row["gap"] == pytest.approx(row["bits_per_byte"])
    assert row["prefixes"] == pytest.approx(40, abs=3)
    for option, refusal in [
        ("--carry", "selects ahead within each segment; evaluate it without --carry"),
        ("--by-document", "a sample of prefixes is scored, so there are no numbers by document"),
        ("--by-context", "what one pass says of a context is no loss"),
    ]:
        assert main(["eval", run, option]) == 2
        assert refusal in capsys.readouterr().err
    assert main(["generate", run, "--prompt", "the", "--length", "5", "--seed", "1"]) == 0


def test_a_strict_model_has_no_prefixes_to_be_sampled(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--prefixes", "5"]) == 2
    assert "this model is strict" in capsys.readouterr().err


def test_generate_repeats_with_its_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(run), "--prompt", "the quick", "--length", "20", "--seed", "3"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("the quick")
    assert main(words) == 0
    assert capsys.readouterr().out == first
    assert main(["generate", str(run), "--temperature", "-1"]) == 2


def test_inspect_audit_and_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", "demo"], ["inspect", str(run)], ["audit", str(run), "--length", "24"], ["list"]):
        assert main([*words, "--json"]) == 0
        json.loads(capsys.readouterr().out)
        assert main(words) == 0
        assert capsys.readouterr().out


@pytest.mark.fault(3)
def test_verify_names_what_is_damaged_and_exits_with_4(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    assert main(["checkpoint", "verify", str(run)]) == 0
    copy = shutil.copytree(run / "checkpoints/step-12", tmp_path / "step-12")
    (copy / "model.safetensors").write_bytes(b"")
    assert main(["checkpoint", "verify", str(copy)]) == 4
    assert "model.safetensors" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path / "nothing")]) == 2


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from launch.cli import main; main(['--help'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_users_own_data_py_does_not_shadow_ours(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("raise SystemExit('shadowed')")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-m", "lmtrain", "list", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
