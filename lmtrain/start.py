"""The start of training: the processes of a launcher find each other, agree on the configuration, and begin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmtrain.config import ParallelConfig, load
from lmtrain.setup import CHECKS
from lmtrain.train import train
from parallel.agree import AgreedError, together
from parallel.deepspeed import load_library
from parallel.watchdog import Watchdog
from parallel.world import join, launched

USER_ERROR = 2


def start(
    path_or_name: str | Path,
    overrides: Sequence[str],
    *,
    resume: Path | None = None,
    fresh: bool = False,
    debug: bool = False,
) -> int:
    """Train as a configuration says (`lmtrain.config.load`), together with the other processes of the launcher if there
    are any; returns the exit code.

    A mistake of the user's is a ValueError on the first rank; the others, which know it too, return USER_ERROR.
    """
    try:
        parallel = load(path_or_name, overrides, ranks=launched()).parallel
    except ValueError:
        parallel = ParallelConfig()  # all ranks must meet before the first one may say what is wrong
    if parallel.engine == "deepspeed":
        load_library()
    sequence = parallel.sequence if launched() % parallel.sequence == 0 else 1  # else `CHECKS` complain
    with join(sequence) as world, Watchdog(world, parallel.timeout) as watchdog:
        checks = CHECKS if world.is_first else ()
        try:
            config = together(world, lambda: load(path_or_name, overrides, checks=checks, ranks=world.size))
            return train(config, resume=resume, fresh=fresh, debug=debug, world=world, watchdog=watchdog)
        except AgreedError:
            if world.is_first:
                raise
            return USER_ERROR
