"""CONTRIBUTING.md is executed: its worked mixer is added to a copy of the repository, trained, audited, tested."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import code_blocks, copy_parts

PARTS = ("attention", "data", "parallel", "lmtrain", "launch", "configs", "docs", "tests", "pyproject.toml")


@pytest.fixture(scope="module")
def copy_with_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the page's three files."""
    copy = tmp_path_factory.mktemp("clone")
    copy_parts(PARTS, copy)
    mixer, oracle = code_blocks("CONTRIBUTING.md", "python")
    (config,) = code_blocks("CONTRIBUTING.md", "yaml")
    (copy / "attention/blocks.py").write_text(mixer)
    (copy / "tests/conformance/oracles/blocks.py").write_text(oracle)
    (copy / "configs/blocks.yaml").write_text(config)
    return copy


def commands() -> list[str]:
    (block,) = code_blocks("CONTRIBUTING.md", "sh")
    return block.splitlines()


@pytest.mark.parametrize("command", commands())
def test_the_worked_example(copy_with_blocks: Path, command: str, tmp_path: Path) -> None:
    words = command.replace('"not slow"', "not_slow").split()
    words = ["not slow" if word == "not_slow" else word for word in words]
    if words[0] == "lmtrain":
        words = ["python", "-m", *words]
    environment = {**os.environ, "PYTHONPATH": str(copy_with_blocks), "LMTRAIN_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=copy_with_blocks, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if words[-1] == "list":
        assert "blocks" in done.stdout
    if words[2] == "pytest":
        assert "passed" in done.stdout
