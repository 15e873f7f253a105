"""A run that is disturbed all the time, beside one that is left alone: python benchmarks/soak.py [--minutes 60]

One run of a small model on Python sources (corpus `stdlib`) is trained through the command line in one life after
another: each ends by a fault, and between two lives the run's folder may be damaged. When the minutes are over the run
is stopped at step S, and another one, which nobody disturbs, is trained to step S. Every row of the two but for its
speed, and every byte of their weights and moments, must be the same.

After each life its exit code must be one that this fault may have; the rows must count 1, 2, 3, ...; the newest
checkpoint that verifies may not be older than the one before. The first thing that is not so ends the soak with 1.

--seed makes the same faults in the same order; the steps that they meet depend on the speed of the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from report import publish_all
from soak_faults import BETWEEN, ENDS
from soak_run import Soak, SoakError

from launch.cli import STOPPED
from lmtrain.checkpoint.manifest import read_manifest
from lmtrain.run import read_metrics


def disturb(soak: Soak, seconds: float) -> Counter[str]:
    """Lives and faults until the time is over; how often each came."""
    faults: Counter[str] = Counter()
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        (end,) = soak.rng.choices(list(ENDS), list(ENDS.values()))
        end(soak)
        soak.check()
        faults[words_of(end)] += 1
        print(f"{passed:6.0f} s  life {soak.starts}, checkpoint {soak.newest}: {words_of(end)}", flush=True)
        if soak.rng.random() < 0.5:
            (damage,) = soak.rng.choices(list(BETWEEN), list(BETWEEN.values()))
            faults[words_of(damage)] += damage(soak)
            print(f"          then: {words_of(damage)}", flush=True)
    return faults


def words_of(fault: Callable[[Soak], Any]) -> str:
    return str(fault.__doc__)


def stop_at_last(soak: Soak) -> int:
    """One more life, which is stopped like any run; the step it has come to."""
    process = soak.start()
    soak.wait_for_steps(process)
    soak.ask(process, signal.SIGTERM)
    soak.check()
    return soak.newest


def undisturbed(soak: Soak, steps: int) -> Path:
    """A run of as many steps that nobody disturbs, and that saves only at its end."""
    run = soak.folder / "undisturbed"
    process = soak.launch(run, "checkpoint.every=1000000", fault=f"step={steps}:term")
    if (code := process.wait()) != STOPPED:
        raise SoakError(f"the undisturbed run ended with {code}")
    return run


def outcome(run: Path, step: int) -> tuple[list[str], dict[str, str]]:
    """What must not depend on faults: the text of every row but for its speed; the hashes of weights and moments."""
    rows = [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in read_metrics(run)]
    files = read_manifest(run / f"checkpoints/step-{step}").files
    hashes = {name: entry.sha256 for name, entry in files.items() if name.endswith(".safetensors")}
    return [json.dumps(row) for row in rows], hashes


def compare(one: Path, other: Path, step: int) -> None:
    """SoakError if anything differs."""
    (rows, hashes), (other_rows, other_hashes) = outcome(one, step), outcome(other, step)
    for number, (row, other_row) in enumerate(itertools.zip_longest(rows, other_rows), 1):
        if row != other_row:
            raise SoakError(f"row {number} is {row}, undisturbed {other_row}")
    if hashes != other_hashes:
        raise SoakError(f"weights or moments at step {step} differ from those of the undisturbed run")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--folder", type=Path, help="a new folder to work in; default: a temporary one")
    parser.add_argument("--json", metavar="FILE", help="keep the numbers")
    return parser.parse_args()


def main() -> int:
    """Disturb a run, train the undisturbed one, compare; 0 if they are the same."""
    arguments = parse_arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # lives started from a shell's background would ignore it
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(exist_ok=True)
    soak = Soak(folder, Random(arguments.seed))
    try:
        faults = disturb(soak, 60 * arguments.minutes)
        steps = stop_at_last(soak)
        print(f"stopped at step {steps}; now as many undisturbed", flush=True)
        compare(soak.run, undisturbed(soak, steps), steps)
    except SoakError as failure:
        print(f"life {soak.starts} (see {folder}/output.txt, seed {arguments.seed}): {failure}", file=sys.stderr)
        return 1
    finally:
        soak.close()
    total = {
        "minutes": arguments.minutes, "seed": arguments.seed, "faults": faults.total(), "starts": soak.starts,
        "steps": steps, "same bits": True, "longest stop (s)": round(soak.stop_seconds, 2),
    }  # fmt: skip
    rows = [{"fault": words, "times": times} for words, times in faults.most_common()]
    publish_all({"total": [total], "faults": rows}, arguments.json)
    if not arguments.folder:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
