"""`lmtrain launch slurm`: the script of a Slurm job that trains a configuration on many nodes.

One task per node starts torchrun, and that the processes of its node; they find each other at the first node of the
job. Slurm sends SIGTERM some time before the job's limit: training saves and stops, and the same script, submitted
again, goes on.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtrain.config import load

PORT = 29400  # where the nodes of a job meet; plus the job's number modulo 1000, for jobs that share a node
SECONDS_TO_SAVE = 180
TIME = re.compile(r"\d+(-\d+)?(:\d+){0,2}")


@dataclass(frozen=True)
class Job:
    """What to ask Slurm for. nodes; processes on each, one per GPU unless `gpus` is false; time: its limit, as Slurm
    writes it (2-12:00:00); options: more `#SBATCH` lines, as `--partition=long`."""

    nodes: int
    processes: int
    gpus: bool
    time: str
    options: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.nodes * self.processes

    @property
    def problems(self) -> list[str]:
        """What Slurm would not understand of it."""
        found = [
            f"--option {word!r}: an option of sbatch, as --partition=long"
            for word in self.options
            if not _is_option(word)
        ]
        if not TIME.fullmatch(self.time):
            found.append(f"--time {self.time!r}: hours:minutes:seconds or days-hours, as 12:00:00 or 2-12")
        return found


def write_script(job: Job, config: str, overrides: Sequence[str], path: Path) -> Path:
    """Write the script that trains `config` to `path`, where nothing may be yet; returns it.

    ValueError, all mistakes at once: the configuration does not fit so many processes, what Slurm is asked for is no
    such thing, the file exists.
    """
    problems = job.problems
    if path.exists():
        problems.append(f"{path} is there already; --out names another file")
    try:
        name = Path(load(config, overrides, ranks=job.world).run.dir or config).name
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    with open(path, "x") as file:
        file.write(script(job, re.sub(r"[^A-Za-z0-9_.-]", "-", name), [config, *overrides]))
    path.chmod(0o755)
    return path


def _is_option(word: str) -> bool:
    return word.startswith("-") and word.isprintable()


def script(job: Job, name: str, words: Sequence[str]) -> str:
    """The text of the script. words: those of `lmtrain train`, which are quoted for the shell; name: plain."""
    asked = [f"--job-name={name}", f"--nodes={job.nodes}", "--ntasks-per-node=1", f"--time={job.time}"]
    asked += [f"--gpus-per-node={job.processes}"] if job.gpus else []
    asked += [f"--signal=TERM@{SECONDS_TO_SAVE}", f"--output={name}-%j.log", "--open-mode=append", *job.options]
    return TEMPLATE.format(
        asked="\n".join(f"#SBATCH {option}" for option in asked),
        port=PORT,
        nodes=job.nodes,
        processes=job.processes,
        words=" ".join(shlex.quote(word) for word in words),
    )


def submit(path: Path) -> str:
    """What sbatch says to the script; ValueError if it refuses, or is not there."""
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(f"--submit: no sbatch on this machine; {path} is written, submit it where Slurm is") from None
    if done.returncode:
        why = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise ValueError(f"sbatch refused {path}: {why}")
    return done.stdout.strip()


TEMPLATE = """\
#!/bin/bash
{asked}
# Submit it from the folder from which you would call `lmtrain train`. After the time limit, submit it again.
set -euo pipefail

export PYTHONSAFEPATH=1  # a file data.py in this folder is not our package `data`
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first="${{nodes%%$'\\n'*}}"  # not `| head -n 1`: a pipe closed early would end the script under pipefail
port=$(({port} + SLURM_JOB_ID % 1000))

srun --kill-on-bad-exit=1 python -m torch.distributed.run \\
    --nnodes={nodes} --nproc-per-node={processes} \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$port" \\
    -m lmtrain train {words}
"""
