"""The runs of a sweep as Slurm jobs: one script trains each; `sweep run` later evaluates what they trained."""

from __future__ import annotations

import re
from collections.abc import Iterator

from launch.slurm import Job, script, submit
from lmtrain.sweep.folder import SweepFolder
from lmtrain.sweep.plan import Plan


def write_scripts(plan: Plan, folder: SweepFolder, job: Job, submitted: bool) -> Iterator[str]:
    """Write scripts/NAME-HASH.slurm for each run that is not trained yet, over one that is there; yields what was done.

    submitted: whether to hand them to sbatch. ValueError for forks, which cannot wait for each other here.
    """
    if any(run.parent is not None for run in plan.runs):
        raise ValueError("--launcher slurm: jobs that fork from each other are not known here; leave out cooldown")
    if job.problems:
        raise ValueError("\n".join(job.problems))
    folder.open().release()
    scripts = folder.path / "scripts"
    scripts.mkdir(exist_ok=True)
    for run in plan.runs:
        if folder.is_trained(run) or folder.is_at_work(run):
            continue
        path = scripts / f"{run.folder}.slurm"
        words = [plan.spec.base, *run.words, f"run.dir={folder.of(run)}"]
        path.write_text(script(job, re.sub(r"[^A-Za-z0-9_.-]", "-", run.folder), words))
        path.chmod(0o755)
        yield submit(path) if submitted else f"{path}: submit it with sbatch {path}"
    yield "when the jobs are done, the same command with --launcher local evaluates what they trained"
