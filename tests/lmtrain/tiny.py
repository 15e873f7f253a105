"""A run small enough that a test trains it in a second."""

import os
import subprocess
import sys
from pathlib import Path

from lmtrain.config import Config, load
from lmtrain.setup import CHECKS
from tests.processes import begin

SHORT = """
train: {steps: 12, batch_tokens: 128, micro_batch: 2}
log: {every: 1, tensorboard: false}
eval: {every: 4, tokens: 256}
checkpoint: {every: 4}
"""
"""A run of three evaluations and checkpoints."""

CONFIG = f"""
data: {{corpus: text, seq_len: 32}}
{SHORT}
model:
  dim: 16
  layers: 2
  dropout: 0.1
  mixers:
    near: {{kind: local, heads: 2, window: 8}}
    far: {{kind: dense, heads: 2}}
  pattern: near far
"""


def write(folder: Path) -> Path:
    """The configuration and its text in `folder`; returns the path of the configuration."""
    (folder / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog, again and again. " * 60)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def settings(folder: Path, *overrides: str) -> list[str]:
    """Overrides that keep everything below `folder`."""
    return [f"data.path={folder}/text.txt", f"data.cache={folder}/cache", f"run.dir={folder}/run", *overrides]


def config(folder: Path, *overrides: str) -> Config:
    """The configuration, checked as the command line checks it."""
    path = folder / "tiny.yaml" if (folder / "tiny.yaml").exists() else write(folder)
    return load(path, settings(folder, *overrides), checks=CHECKS)


def command(folder: Path, *words: str, fault: str = "") -> subprocess.Popen[str]:
    """`lmtrain train` on it in a process of its own."""
    path = folder / "tiny.yaml" if (folder / "tiny.yaml").exists() else write(folder)
    options = [word for word in words if word.startswith("-")]
    overrides = settings(folder, *(word for word in words if not word.startswith("-")))
    return begin(
        [sys.executable, "-m", "lmtrain", "train", str(path), *overrides, *options],
        env={**os.environ, "LMTRAIN_FAULT": fault},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
