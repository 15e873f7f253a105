"""README.md is executed: every command it shows, on a shortened demo run; its table of mixers is the registry's."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from attention.mixer import MIXERS
from tests.documents import ROOT, code_blocks

SHORT = ["train.steps=2", "train.batch_tokens=1024", "data.seq_len=256", "eval.tokens=512", "model.dim=32"]
LITTLE = ["data.validation=0.01"]
TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 200


def commands() -> list[str]:
    """Each command line of the page, without its comment."""
    lines = [line for block in code_blocks("README.md", "sh") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def ours() -> list[str]:
    return [command for command in commands() if command.startswith("lmtrain ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would stand after `make demo`: beside configs/, with runs/demo trained."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "enwik8").write_bytes(b"<mediawiki xmlns=" + TEXT)
    (folder / "input.txt").write_bytes(TEXT)
    for split, number in (("train", 1), ("validation", 2)):
        (folder / "deepmind-gutenberg" / split).mkdir(parents=True)
        (folder / "deepmind-gutenberg" / split / f"{number}.txt").write_bytes(b"Book %d\r\n" % number + TEXT)
    (folder / "books").mkdir()
    (folder / "books/one.txt").write_bytes(TEXT)
    (folder / "texts").mkdir()
    (folder / "texts/mine.jsonl").write_text(json.dumps({"text": TEXT.decode()}))
    run(folder, ["lmtrain", "train", "demo", *SHORT, *LITTLE])
    return folder


@pytest.mark.parametrize("command", ours())
def test_every_command_of_the_page(folder: Path, command: str) -> None:
    words = shlex.split(command)
    if words[1] == "train":
        words += SHORT
    if words[1] == "bench":
        words += ["--lengths", "128,256", "--repeats", "1"]
    if "--floor" in words:
        words += ["--steps", "3", "--length", "64"]
    if words[1] == "generate":
        words += ["--length", "20"]
    assert run(folder, words)


def test_the_commands_that_are_not_ours_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in set(commands()) - set(ours()):
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.M), command
        else:
            assert command.startswith("git clone"), f"{command}: who executes this?"


def test_ci_runs_the_pages_test_command() -> None:
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert "make test" in script
    assert "make check" in script


def test_the_table_of_mixers_says_what_works() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (works|planned) \|", (ROOT / "README.md").read_text(), re.M)
    assert {name for name, state in rows if state == "works"} == set(MIXERS)
    assert len(rows) == 12


def run(folder: Path, words: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LMTRAIN_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
