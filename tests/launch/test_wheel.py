"""A wheel, installed alone in an empty folder, trains by the name of a shipped configuration, far from any clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import copy_parts
from tests.lmtrain import tiny

PARTS = ("attention", "data", "parallel", "lmtrain", "launch", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was installed, without network and without dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_parts(PARTS, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    _run([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "dist", source])
    (wheel,) = (folder / "dist").glob("*.whl")
    _run([*pip, "install", *offline, "--target", folder / "installed", wheel])
    return folder / "installed"


def test_the_wheel_trains_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "LMTRAIN_CACHE": str(tmp_path / "cache")}
    where = [sys.executable, "-P", "-c", "import lmtrain, launch.cli; print(lmtrain.__file__, launch.cli.__file__)"]
    files = _run(where, cwd=tmp_path, env=environment).split()
    assert all(Path(file).is_relative_to(installed) for file in files)
    short = ["train.steps=2", "train.batch_tokens=512", "data.seq_len=256", "eval.tokens=512", "run.dir=run"]
    _run([sys.executable, "-P", "-m", "lmtrain", "train", "demo", *short], cwd=tmp_path, env=environment)
    assert (tmp_path / "run/checkpoints/step-2/manifest.json").is_file()


def test_the_installed_command_takes_a_path_too(installed: Path, tmp_path: Path) -> None:
    path = tiny.write(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    words = [installed / "bin/lmtrain", "train", path, *tiny.settings(tmp_path, "train.steps=1")]
    _run([sys.executable, "-P", *words], cwd=tmp_path, env=environment)
    assert (tmp_path / "run/checkpoints/step-1").is_dir()


def _run(words: list[object], **options: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
