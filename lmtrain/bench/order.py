"""What a user asked to be measured, checked: every mistake is told at once, before anything starts."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attention.mixer import MIXERS, nearest, read_settings
from lmtrain.config import Config, Problem, load, reload
from lmtrain.config.problems import COMMAND_LINE
from lmtrain.hardware import pick_device

DEFAULT = Path(__file__).with_name("default.yaml")
FILES = JSON, CSV, PLOT = "bench.json", "bench.csv", "bench.svg"
TABLE = "kernels.json"
LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (2048, 4096, 8192, 16384, 32768, 65536)}
REPEATS = {"cpu": 5, "cuda": 20}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
SECONDS = 120.0


@dataclass(frozen=True)
class Order:
    """What to measure, and how.

    mixers: name -> kind and settings; dim: of the vectors between them; lengths: rising, in tokens; repeats: of each
    timing; seconds: what all may take; seed: of the weights; out: the folder for the files.
    """

    mixers: dict[str, dict[str, Any]]
    dim: int
    lengths: tuple[int, ...]
    repeats: int
    seconds: float
    seed: int
    device: torch.device
    dtype: str
    threads: int | None
    out: Path

    def protocol(self) -> dict[str, Any]:
        """For the JSON: all that decides what the numbers mean."""
        values = dataclasses.asdict(self) | {"device": str(self.device), "lengths": list(self.lengths)}
        values["seconds"] = None if math.isinf(self.seconds) else self.seconds
        del values["out"], values["threads"]
        return {"batch": 1, "warm_up": 1, "statistic": "median", **values}


def read_order(
    config: str | None,
    overrides: Sequence[str] = (),
    *,
    mixers: Sequence[str] = (),
    lengths: Sequence[int] = (),
    repeats: int | None = None,
    seconds: float | None = None,
    device: str | None = None,
    out: str | None = None,
    tune: bool = False,
) -> Order:
    """The order for the mixers of a configuration (file, shipped name, or a run's folder); None: all registered ones.

    mixers: only these; device: `cpu` or `cuda`; out: a folder without results, by default a new one in `bench/`;
    tune: the order is for the tuner of the kernels, which has no lengths and no limit of time.
    What is left out follows the device. Without `lengths` and `seconds` all takes about two minutes; lengths that
    were asked for are measured, however long it takes. Raises ConfigError with every problem.
    """
    where = device or pick_device().type
    folder = Path(out) if out is not None else Path("bench") / time.strftime("%Y-%m-%d-%H%M%S")

    def check(found: Config) -> Iterator[Problem]:
        yield from _mixer_problems(found, mixers)
        yield from _device_problems(where, found.train.dtype)
        yield from _folder_problems(folder, [TABLE] if tune else FILES)
        if tune:
            yield from _tuning_problems(where, {"--lengths": lengths, "--seconds": seconds})

    if config is None:
        found = load(DEFAULT, [*_registered(mixers, where), *overrides], checks=[check])
    else:
        read = reload if Path(config).is_dir() else load
        found = read(config, overrides, checks=[check])
    return Order(
        mixers={name: found.model.mixers[name] for name in dict.fromkeys(mixers or found.model.mixers)},
        dim=found.model.dim,
        lengths=tuple(sorted(set(lengths or LENGTHS[where]))),
        repeats=repeats or REPEATS[where],
        seconds=seconds or (math.inf if lengths else SECONDS),
        seed=found.run.seed,
        device=torch.device(where),
        dtype=found.train.dtype,
        threads=found.train.threads,
        out=folder,
    )


def _registered(mixers: Sequence[str], device: str) -> list[str]:
    """Overrides that define each mixer under its own name, in its default settings."""
    names = [name for name in sorted(MIXERS) if name in mixers] or sorted(MIXERS)
    defined = [f"model.mixers.{name}={{kind: {name}}}" for name in names]
    return [*defined, f"model.pattern={' '.join(names)}", f"train.dtype={DTYPES.get(device, 'float32')}"]


def _mixer_problems(config: Config, mixers: Sequence[str]) -> Iterator[Problem]:
    """Names that the configuration does not have; settings of those that its pattern leaves out."""
    known = list(config.model.mixers)
    for name in mixers:
        if name not in known:
            message = f"no such mixer here{nearest(name, known)} ({', '.join(known)})"
            yield Problem(COMMAND_LINE, "--mixers", message, name)
    for name in mixers or known:
        settings = dict(config.model.mixers.get(name, {}))
        if kind := settings.pop("kind", None):
            for setting, message in read_settings(kind, config.model.dim, settings)[1]:
                yield Problem("", f"model.mixers.{name}.{setting}", message)


def _device_problems(device: str, dtype: str) -> Iterator[Problem]:
    if device == "cuda" and not torch.cuda.is_available():
        yield Problem(COMMAND_LINE, "--device", "no CUDA device is here", device)
    if device == "cpu" and dtype == "float16":
        message = "needs a CUDA device: CPUs have no fast float16; use bfloat16 or float32"
        yield Problem("", "train.dtype", message)


def _tuning_problems(device: str, idle: dict[str, object]) -> Iterator[Problem]:
    if device != "cuda":
        yield Problem(COMMAND_LINE, "--tune", "needs a CUDA device: the table is of its kernels")
    for option, value in idle.items():
        if value:
            yield Problem(COMMAND_LINE, option, "has no effect with --tune, which has its own lengths")


def _folder_problems(folder: Path, files: Sequence[str]) -> Iterator[Problem]:
    """Results are never overwritten."""
    if there := [name for name in files if (folder / name).exists()]:
        yield Problem(COMMAND_LINE, "--out", f"holds {' and '.join(there)} already; choose another folder", str(folder))
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        yield Problem(COMMAND_LINE, "--out", f"{parent} is a file, not a folder", str(folder))
