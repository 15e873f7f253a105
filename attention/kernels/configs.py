"""Tile sizes and warps of each kernel: a static table, so that a run is as fast in its first step as in its last.

Keyed by architecture, kernel, kind of type and padded head width, never by length. The compile check of the tests holds
every row to no spills and to the shared memory there is. A table measured on other hardware (`lmtrain bench --tune`) is
a JSON file of the same shape; LMTRAIN_KERNEL_CONFIGS names it.
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

import torch

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


Place = tuple[int, Kernel, Kind, int]
"""(architecture, kernel, kind, padded head width)."""

HOPPER, OTHER = 90, 80
"""Devices of compute capability 9.0 and above that have its shared memory; all others from 8.0 on."""

SHARED = {HOPPER: 227 * 1024, OTHER: 99 * 1024}
"""Bytes that a program may have: of the others the least, as on 8.6, 8.9 and 12.0."""

# Hopper, 16-bit types: 128 rows wherever registers allow, since two warpgroups of 64 rows are what wgmma wants; whole
# tiles in a loop of their own where registers are free. Float32 multiplies in full precision, without tensor cores:
# small tiles. Heads of 256 get past the registers in tiles of 32 keys only, which are products of single warps.
_NARROW = (16, 32, 64)
_EVERY = [(on, kernel) for on in (HOPPER, OTHER) for kernel in KERNELS]
TABLE: dict[Place, Config] = {
    (HOPPER, "forward", "half", 16): Config(128, 128, 8, 2, True),
    (HOPPER, "forward", "half", 32): Config(128, 128, 8, 2, True),
    (HOPPER, "forward", "half", 64): Config(128, 128, 8, 3, True),
    (HOPPER, "forward", "half", 128): Config(128, 64, 8, 3, True),
    (HOPPER, "forward", "half", 256): Config(128, 32, 8, 2, False),
    (HOPPER, "query_gradient", "half", 16): Config(128, 64, 8, 2, True),
    (HOPPER, "query_gradient", "half", 32): Config(128, 64, 8, 3, True),
    (HOPPER, "query_gradient", "half", 64): Config(128, 64, 8, 2, True),
    (HOPPER, "query_gradient", "half", 128): Config(128, 64, 8, 2, False),
    (HOPPER, "query_gradient", "half", 256): Config(128, 32, 8, 2, False),
    (HOPPER, "key_gradient", "half", 16): Config(64, 128, 8, 2, False),
    (HOPPER, "key_gradient", "half", 32): Config(64, 128, 8, 2, False),
    (HOPPER, "key_gradient", "half", 64): Config(64, 128, 8, 2, False),
    (HOPPER, "key_gradient", "half", 128): Config(32, 128, 8, 2, False),
    (HOPPER, "key_gradient", "half", 256): Config(32, 32, 8, 2, False),
    **{(OTHER, "forward", "half", width): Config(128, 64, 8, 2, False) for width in _NARROW},
    (OTHER, "forward", "half", 128): Config(128, 32, 8, 2, False),
    (OTHER, "forward", "half", 256): Config(64, 16, 8, 2, False),
    **{(OTHER, "query_gradient", "half", width): Config(128, 64, 8, 2, False) for width in _NARROW},
    (OTHER, "query_gradient", "half", 128): Config(64, 32, 8, 2, False),
    (OTHER, "query_gradient", "half", 256): Config(32, 16, 8, 2, False),
    **{(OTHER, "key_gradient", "half", width): Config(32, 128, 8, 2, False) for width in _NARROW},
    (OTHER, "key_gradient", "half", 128): Config(32, 64, 8, 2, False),
    (OTHER, "key_gradient", "half", 256): Config(32, 32, 8, 2, False),
    **{(on, kernel, "single", width): Config(32, 32, 4, 2, False) for on, kernel in _EVERY for width in (16, 32)},
    **{(on, kernel, "single", 64): Config(32, 32, 8, 2, False) for on, kernel in _EVERY},
    **{(on, kernel, "single", 128): Config(32, 16, 8, 1, False) for on, kernel in _EVERY},
    **{(on, kernel, "single", 256): Config(16, 16, 8, 1, False) for on, kernel in _EVERY},
}

# A gate needs registers of its own: where the rows above would spill with it, these go before. A bias fits in.
GATED: dict[Place, Config] = {
    (HOPPER, "forward", "half", 64): Config(128, 64, 8, 3, True),
    (HOPPER, "forward", "half", 128): Config(128, 64, 8, 3, False),
    (HOPPER, "query_gradient", "half", 128): Config(128, 32, 8, 3, False),
    (HOPPER, "query_gradient", "half", 256): Config(128, 16, 8, 2, False),
    (HOPPER, "key_gradient", "half", 16): Config(32, 128, 8, 2, False),
    (HOPPER, "key_gradient", "half", 32): Config(32, 128, 8, 2, False),
    (HOPPER, "key_gradient", "half", 64): Config(32, 128, 8, 2, False),
    (HOPPER, "key_gradient", "half", 128): Config(16, 128, 8, 2, False),
}


def find_config(kernel: Kernel, kind: Kind, width: int, *, gated: bool = False, on: int = HOPPER) -> Config:
    """The configuration for a padded head width, of calls with or without a gate.

    A row of the user's own table goes before ours in TABLE; rows of GATED stay, as what is tuned has no gate.
    """
    place = on, kernel, kind, width
    if gated and place in GATED:
        return GATED[place]
    return _table()[place]


@functools.cache
def architecture(device: torch.device) -> int:
    """The rows that serve a device; a CPU's interpreter gets Hopper's."""
    if device.type != "cuda":
        return HOPPER
    has = torch.cuda.get_device_properties(device)
    shared = getattr(has, "shared_memory_per_block_optin", SHARED[HOPPER] if has.major == 9 else 0)
    return HOPPER if has.major >= 9 and shared >= SHARED[HOPPER] else OTHER


@functools.cache
def _table() -> dict[Place, Config]:
    path = os.environ.get(ENVIRONMENT)
    return {**TABLE, **(read_table(Path(path)) if path else {})}


@contextmanager
def trying(place: Place, config: Config) -> Iterator[None]:
    """Meanwhile the kernel runs with this configuration: for the tuner."""
    table = _table()
    before, table[place] = table[place], config
    try:
        yield
    finally:
        table[place] = before


def write_table(table: dict[Place, Config], path: Path) -> None:
    """As JSON: a list of {architecture, kernel, kind, width, queries, keys, warps, stages, two_loops}."""
    rows = [{**dict(zip(_PLACE, place)), **asdict(config)} for place, config in sorted(table.items())]
    path.write_text(json.dumps(rows, indent=1) + "\n")


_PLACE = ("architecture", "kernel", "kind", "width")


def read_table(path: Path) -> dict[Place, Config]:
    """The reverse of `write_table`. ValueError names the file and the row that is not one."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{ENVIRONMENT}: {path} is no table of kernel configurations: {error}") from None
    table = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            place = tuple(row.pop(name) for name in _PLACE)
            table[place] = Config(**row)
        except (AttributeError, KeyError, TypeError):
            place = None
        if place not in TABLE:
            example = {**dict(zip(_PLACE, next(iter(TABLE)))), **asdict(next(iter(TABLE.values())))}
            raise ValueError(f"{ENVIRONMENT}: {path}: row {number} is none; expected one like {json.dumps(example)}")
    return table
