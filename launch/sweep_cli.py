"""`lmtrain sweep plan | run | status`: the verb's arguments, and one function for each action."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.report_cli import add_actions
from launch.show import show


def add_sweep(sweep: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Give the verb its actions. positive: reads a whole number >= 1."""
    actions = sweep.add_subparsers(dest="action", required=True, metavar="ACTION")
    plan = _action(actions, "plan", _plan, "what its runs are and cost; nothing is started")
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")
    run = _action(actions, "run", _run, "run what is not done yet, evaluate it, keep the results")
    run.add_argument("--workers", type=positive, default=1, metavar="K", help="runs at a time (1)")
    run.add_argument("--threads", type=positive, help="of each process (the cores, shared among the workers)")
    run.add_argument("--retries", type=_count, default=1, help="of a run that crashed (1)")
    run.add_argument("--timeout", type=positive, metavar="SECONDS", help="for training a run, and for evaluating it")
    launchers = ["local", "torchrun", "deepspeed", "slurm"]
    run.add_argument("--launcher", choices=launchers, default="local", help="slurm: write a script for each run")
    run.add_argument("--processes", type=positive, default=1, metavar="N", help="of each run, with a launcher (1)")
    run.add_argument("--gpus", action="store_true", help="slurm: a GPU for each process")
    run.add_argument("--time", default="24:00:00", help="slurm: limit of each job (24:00:00)")
    run.add_argument("--submit", action="store_true", help="slurm: also hand the scripts to sbatch")
    status = _action(actions, "status", _status, "how each of its runs stands")
    status.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_actions(actions)


def _action(actions: Any, name: str, run: Callable[[Any], int], summary: str) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    action.set_defaults(run=run)
    action.add_argument("sweep", help="a YAML file, or the name of a shipped sweep (enwik8-mixers)")
    action.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, before the file's")
    action.add_argument("--out", type=Path, metavar="FOLDER", help="of the runs (runs/ and the sweep's name)")
    return action


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {number}")
    return number


def _opened(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The plan, and the folder of its runs, which is that of this sweep or not there yet."""
    from lmtrain.sweep.folder import SweepFolder
    from lmtrain.sweep.planner import make_plan

    plan = make_plan(arguments.sweep, arguments.overrides)
    folder = SweepFolder((arguments.out or Path("runs") / plan.spec.name).expanduser().absolute(), plan.spec.name)
    folder.check()
    return plan, folder


def _plan(arguments: argparse.Namespace) -> int:
    from lmtrain.sweep.pace import pace_of

    plan, folder = _opened(arguments)
    pace, source = pace_of(plan, folder)
    show(arguments, lambda: plan.to_json(pace), lambda: plan.format(pace, source))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from launch.slurm import Job
    from launch.sweep import Driver, Options, check_before
    from launch.sweep_slurm import write_scripts

    plan, folder = _opened(arguments)
    if arguments.launcher == "slurm":
        job = Job(1, arguments.processes, arguments.gpus, arguments.time)
        for line in write_scripts(plan, folder, job, arguments.submit):
            print(line)
        return 0
    check_before(plan, arguments.processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = Options(
        workers=arguments.workers,
        threads=arguments.threads or max(1, cores // (arguments.workers * arguments.processes)),
        retries=arguments.retries,
        timeout=arguments.timeout,
        launcher=arguments.launcher,
        processes=arguments.processes,
    )
    return Driver(plan, folder, options, lambda line: print(line, file=sys.stderr, flush=True)).go()


def _status(arguments: argparse.Namespace) -> int:
    from lmtrain.sweep.standing import standing_of

    plan, folder = _opened(arguments)
    standing = standing_of(plan, folder)
    show(arguments, standing.to_json, standing.format)
    return 0
