"""Single runs as results that can be compared: what `lmtrain report RUN...` reads from their folders."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.disk import sha256_json
from lmtrain.config import Config, reload, to_dict
from lmtrain.run import read_metrics, read_status
from lmtrain.sweep.collect import STATE_LENGTH, numbers_of
from lmtrain.sweep.comparison import Collected, collect
from lmtrain.sweep.result import RunResult

Row = dict[str, Any]
PROTOCOL = ("corpus", "split", "fingerprint", "context", "stride", "scored_tokens")
"""What two evaluations must share to be compared."""


def read_runs(folders: Sequence[Path]) -> Collected:
    """The runs in these folders, scored alike. ValueError with everything that is wrong with any.

    Of each the evaluations of its last step count, of training or kept by `lmtrain eval`: in the way that all runs were
    scored, of several in that with most tokens. Runs whose configurations differ in the seed alone are one variant.
    """
    if len(set(folders)) < len(folders):
        raise ValueError("one of the runs is named twice")
    scored, problems = {}, []
    for folder in folders:
        try:
            scored[folder] = _evaluations(folder)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    common = set.intersection(*(set(rows) for rows in scored.values()))
    if not common:
        ways = "\n".join(f"  {folder}: {' | '.join(map(_in_words, rows))}" for folder, rows in scored.items())
        raise ValueError(
            f"no evaluation that all runs have in common:\n{ways}\nscore them alike: lmtrain eval RUN --context C"
        )
    way = max(common, key=lambda way: way[-1] or 0)
    short = len({folder.resolve().name for folder in folders}) == len(folders)
    names = [folder.resolve().name if short else str(folder) for folder in folders]
    labels: dict[str, str] = {}
    results = [_result(name, folder, scored[folder][way], labels) for name, folder in zip(names, folders, strict=True)]
    return collect(" and ".join(names) if len(names) < 4 else f"{len(names)} runs", results)


def _evaluations(folder: Path) -> dict[tuple[Any, ...], Row]:
    """The newest evaluation in each protocol, of the finished run in the folder."""
    status = read_status(folder)
    if status is None:
        raise ValueError(f"{folder}: no run there; a run is named by its folder, which training says in its last line")
    if status.state != "done":
        raise ValueError(f"{folder}: {status.state} at step {status.step}; finish it first, lmtrain train goes on")
    found: dict[tuple[Any, ...], Row] = {}
    kept = [_read(path) for path in sorted((folder / "eval").glob("*.json"))]
    rows = [_text(reload(folder)) | row for row in read_metrics(folder) if "scored_tokens" in row]
    for row in sorted([*rows, *kept], key=lambda row: row.get("step") or 0):
        if row.get("step") == status.step and row.get("loss") is not None and row.get("scoring") != "carried":
            found[tuple(row.get(name) for name in PROTOCOL)] = row
    if not found:
        raise ValueError(f"{folder}: its last step, {status.step}, was not scored; lmtrain eval {folder}")
    return found


def _text(config: Config) -> Row:
    """Which text the evaluations of training are of; their rows do not say it."""
    data = config.data
    return {"corpus": data.corpus, "fingerprint": f"validation={data.validation} of {data.path or 'the corpus'}"}


def _read(path: Path) -> Row:
    try:
        row = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable: {error}") from None
    return row if isinstance(row, dict) else {}


def _in_words(way: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(PROTOCOL, way, strict=True) if value is not None)


def _result(name: str, folder: Path, scored: Row, labels: dict[str, str]) -> RunResult:
    """labels: hash of a configuration -> the variant's name, that of its first run."""
    config = reload(folder)
    settings = {section: values for section, values in to_dict(config).items() if section != "run"}
    key = sha256_json(settings)[:12]
    environment = _read(folder / "environment.json")
    return RunResult(
        name=name,
        hash=key,
        axes={},
        mixer=labels.setdefault(key, name),
        parent=None,
        group=name,
        command=shlex.join(map(str, environment.get("command", []))),
        environment=environment,
        **numbers_of(config, folder, scored, [STATE_LENGTH]),
    )
