"""Tile sizes and warps of each kernel: a static table, so that a run is as fast in its first step as in its last.

Keyed by kernel, kind of type and padded head width, never by length. Registers and shared memory of every row are
held to `compiled.json` by the compile check. A table measured on other hardware (`lmtrain bench --tune`) is a
JSON file of the same shape; LMTRAIN_KERNEL_CONFIGS names it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Kernel = Literal["forward", "query_gradient", "key_gradient"]
Kind = Literal["half", "single"]
KERNELS: tuple[Kernel, ...] = ("forward", "query_gradient", "key_gradient")
WIDTHS = (16, 32, 64, 128, 256)
ENVIRONMENT = "LMTRAIN_KERNEL_CONFIGS"


@dataclass(frozen=True)
class Config:
    """queries, keys: sides of a tile; two_loops: whole tiles in a loop of their own, without element masks."""

    queries: int
    keys: int
    warps: int
    stages: int
    two_loops: bool


# 16-bit types: 128 rows wherever registers allow, since two warpgroups of 64 rows are what wgmma wants. The second
# loop pays where registers are free, and spills in the gradients of wide heads. Float32 multiplies in full precision
# without tensor cores: small tiles.
TABLE: dict[tuple[Kernel, Kind, int], Config] = {
    ("forward", "half", 16): Config(128, 128, 4, 3, True),
    ("forward", "half", 32): Config(128, 128, 4, 3, True),
    ("forward", "half", 64): Config(128, 128, 8, 3, True),
    ("forward", "half", 128): Config(128, 64, 8, 3, True),
    ("forward", "half", 256): Config(128, 32, 8, 2, False),
    ("query_gradient", "half", 16): Config(128, 64, 8, 2, True),
    ("query_gradient", "half", 32): Config(128, 64, 8, 2, True),
    ("query_gradient", "half", 64): Config(128, 64, 8, 2, True),
    ("query_gradient", "half", 128): Config(128, 64, 8, 2, False),
    ("query_gradient", "half", 256): Config(64, 32, 8, 2, False),
    ("key_gradient", "half", 16): Config(64, 128, 8, 2, False),
    ("key_gradient", "half", 32): Config(64, 128, 8, 2, False),
    ("key_gradient", "half", 64): Config(64, 128, 8, 2, False),
    ("key_gradient", "half", 128): Config(32, 128, 8, 2, False),
    ("key_gradient", "half", 256): Config(32, 64, 8, 2, False),
    **{("forward", "single", width): Config(64, 32, 4, 2, True) for width in (16, 32, 64)},
    **{("query_gradient", "single", width): Config(32, 32, 4, 2, True) for width in (16, 32, 64)},
    **{("key_gradient", "single", width): Config(32, 32, 4, 2, False) for width in (16, 32, 64)},
    **{(kernel, "single", 128): Config(32, 32, 4, 1, False) for kernel in KERNELS},
    **{(kernel, "single", 256): Config(16, 16, 4, 1, False) for kernel in KERNELS},
}


def find_config(kernel: Kernel, kind: Kind, width: int) -> Config:
    """The configuration for a padded head width; a row of the user's own table goes before ours."""
    return _table()[kernel, kind, width]


@functools.cache
def _table() -> dict[tuple[Kernel, Kind, int], Config]:
    path = os.environ.get(ENVIRONMENT)
    return {**TABLE, **(read_table(Path(path)) if path else {})}


@contextmanager
def trying(kernel: Kernel, kind: Kind, width: int, config: Config) -> Iterator[None]:
    """Meanwhile the kernel runs with this configuration: for the tuner."""
    table, place = _table(), (kernel, kind, width)
    before, table[place] = table[place], config
    try:
        yield
    finally:
        table[place] = before


def write_table(table: dict[tuple[Kernel, Kind, int], Config], path: Path) -> None:
    """As JSON: a list of {kernel, kind, width, queries, keys, warps, stages, two_loops}."""
    rows = [{"kernel": k, "kind": t, "width": w, **asdict(config)} for (k, t, w), config in sorted(table.items())]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def read_table(path: Path) -> dict[tuple[Kernel, Kind, int], Config]:
    """The reverse of `write_table`. ValueError names the file and the row that is not one."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{ENVIRONMENT}: {path} is no table of kernel configurations: {error}") from None
    table = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            place = (row.pop("kernel"), row.pop("kind"), row.pop("width"))
            table[place] = Config(**row)
        except (AttributeError, KeyError, TypeError):
            place = None
        if place not in TABLE:
            example = {"kernel": "forward", "kind": "half", "width": 64, **asdict(TABLE["forward", "half", 64])}
            raise ValueError(f"{ENVIRONMENT}: {path}: row {number} is none; expected one like {json.dumps(example)}")
    return table
