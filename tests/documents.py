"""The repository as its readers have it: code blocks of its documents, copies of its parts."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from attention.mixer import MIXERS
from lmtrain.config import SHIPPED, shipped_configs

ROOT = Path(__file__).parent.parent


def code_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language in a page of the repository, in order."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def copy_parts(parts: Sequence[str], to: Path) -> None:
    """Copy files and folders of the repository into the folder `to`, which is made."""
    to.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, to / part)


def loadable_configs(folder: str = "") -> list[str]:
    """Shipped configurations whose mixers are registered: one may be written before its mixer."""
    return [name for name in shipped_configs() if name.startswith(folder) and _kinds(name) <= set(MIXERS)]


def _kinds(name: str) -> set[str]:
    mixers = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())["model"]["mixers"]
    return {mixer["kind"] for mixer in mixers.values()}
