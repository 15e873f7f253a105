"""The command line. Each verb is one function here that calls the library and prints; nothing else happens here.

Exit codes: 0 done, 2 the user's mistake, 3 some runs of a sweep failed, 4 the answer is no (a leak, a damaged
checkpoint, training gave up), 75 stopped early and can go on, 130 interrupted; others are crashes. With --json one
JSON object goes to stdout and all else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import (
    add_audit,
    add_bench,
    add_checkpoint,
    add_compare,
    add_eval,
    add_generate,
    add_inspect,
    add_launch,
    add_prepare,
    add_train,
    positive,
)
from launch.report_cli import add_report, report
from launch.show import show
from launch.sweep_cli import add_sweep
from lmtrain import __version__

if TYPE_CHECKING:
    from data.tasks import TaskDataset
    from lmtrain.restore import Restored

CRASHED = 1
NO = 4
USER_ERROR = 2
STOPPED = 75
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        return arguments.run(arguments)
    except ValueError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"lmtrain {arguments.verb}: {error}" if "\n" not in str(error) else error, file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except MemoryError as error:
        if arguments.debug or not str(error):
            raise
        print(f"lmtrain {arguments.verb}: {error}", file=sys.stderr)
        return CRASHED
    except BrokenPipeError:  # the reader of a pipe went away: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"lmtrain {arguments.verb}: {error.strerror}: {str(error.filename)[:80]}...", file=sys.stderr)
        return USER_ERROR


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments as a namespace with `run`, the function of the verb. Mistakes exit with 2."""
    if os.environ.get("RANK", "0") != "0":  # of a launcher's processes one tells the user what is wrong
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            return _parsed(argv)
    return _parsed(argv)


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser, verbs = _parser()
    # The deepspeed launcher says this in front of our words; the environment says it too.
    argv = argv[1:] if argv and argv[0].startswith("--local_rank=") else argv
    arguments, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    stray = [word for word in rest if word not in overrides]
    if stray or (overrides and not hasattr(arguments, "overrides")):
        verbs[arguments.verb].error(f"unrecognized arguments: {' '.join(stray or overrides)}")
    if overrides:  # key=value may stand before or behind options
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="lmtrain",
        description="Train language models on long sequences with pluggable sequence mixers.",
    )
    parser.add_argument("--version", action="version", version=f"lmtrain {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str,
        run: Callable[[Any], int] | None,
        summary: str,
        *examples: str,
        debug: str = "show the traceback of an error",
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog="examples:\n" + "\n".join(f"  lmtrain {name} {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)  # None: its actions have functions of their own
        sub.add_argument("--debug", action="store_true", help=debug)
        return sub

    add_train(
        verb(
            "train",
            _train,
            "train a model, or go on training it",
            "demo",
            "demo run.dir=runs/wide model.dim=256",
            debug="show the traceback of an error; stop where a number that is not finite arises (slower)",
        )
    )
    add_prepare(
        verb(
            "prepare",
            _prepare,
            "tokenize a corpus before a run needs it",
            "enwik8/local data.path=enwik8",
            "text data.path=books data.tokenizer=bpe --workers 8 --json",
        )
    )
    add_eval(
        verb(
            "eval",
            _eval,
            "score a text with a trained model",
            "runs/demo",
            "runs/demo --on text:all --path book.txt --json",
        )
    )
    add_compare(
        verb(
            "compare",
            _compare,
            "whether one model is better than another, or it was chance",
            "runs/demo runs/wide",
            "runs/demo runs/wide --on pg19:test --context 8192 --stride 512",
        )
    )
    add_generate(
        verb(
            "generate",
            _generate,
            "let a trained model write",
            'runs/demo --prompt "def "',
            "runs/demo --temperature 0 --length 200",
        )
    )
    add_inspect(
        verb("inspect", _inspect, "what a model costs, without making it", "demo", "demo model.pattern=far --json")
    )
    add_audit(verb("audit", _audit, "whether a model sees the future", "runs/demo --json", "leak/mosa-paper --floor"))
    listing = verb("list", _list, "the mixers and what they cost", "", "--length 65536 --json")
    listing.add_argument("--length", type=positive, default=8192, help="tokens at which costs are stated (8192)")
    listing.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_bench(
        verb(
            "bench",
            _bench,
            "time and memory of mixers against length, beside dense attention",
            "",
            "demo model.mixers.near.window=64 --lengths 2048,8192,32768",
        )
    )
    add_checkpoint(
        verb(
            "checkpoint",
            _checkpoint,
            "what checkpoints there are; whether they are intact; their model for other programs",
            "list runs/demo",
            "verify runs/demo",
            "repair runs/demo",
            "export runs/demo/checkpoints/step-300 --safetensors --out my-model",
        )
    )
    add_launch(
        verb(
            "launch",
            _launch,
            "write the script of a Slurm job that trains",
            "slurm enwik8/local --nodes 2 --processes 2 --gpus",
            "slurm demo --time 12:00:00 --option=--partition=long --submit",
        )
    )
    add_sweep(
        verb(
            "sweep",
            None,
            "many runs that differ in a few settings: plan and run them, fit their laws, report",
            "plan sparsity data.path=enwik8",
            "run enwik8-mixers data.path=enwik8 --workers 2",
        ),
        positive,
    )
    add_report(
        verb("report", report, "one page that compares finished runs", "runs/demo runs/wide", "runs/* --out compared")
    )
    return parser, dict(verbs.choices)


def _train(arguments: argparse.Namespace) -> int:
    from lmtrain.start import start

    how = {"resume": arguments.resume, "fresh": arguments.fresh, "debug": arguments.debug}
    return start(arguments.config, arguments.overrides, **how)


def _prepare(arguments: argparse.Namespace) -> int:
    from lmtrain.prepare import prepare, read_order

    try:
        prepared = prepare(read_order(arguments.config, arguments.overrides), arguments.workers)
    except KeyboardInterrupt:
        print("lmtrain prepare: stopped; what is finished is kept, and the same command goes on", file=sys.stderr)
        return STOPPED
    show(arguments, prepared.to_json, prepared.format)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from lmtrain.evaluation.run import Asked, evaluate_run
    from lmtrain.evaluation.words import format_result
    from lmtrain.restore import open_run
    from lmtrain.setup import read_task

    restored = open_run(arguments.run_dir)
    if (task := read_task(restored.config, restored.tokenizer, arguments.on)) is not None:
        return _eval_task(arguments, restored, task)
    _refuse(arguments, ("length", "examples"), "for synthetic tasks only, such as --on passkey")
    names = ("on", "path", "context", "stride", "carry", "prefixes", "by_document", "by_context", "plot")
    asked = Asked(**{name: getattr(arguments, name) for name in names})
    result = evaluate_run(restored, asked)
    show(arguments, lambda: result.row, lambda: format_result(result.evaluation, asked.by_document))
    print(f"kept in {result.kept}", file=sys.stderr)
    return 0


def _eval_task(arguments: argparse.Namespace, restored: Restored, task: TaskDataset) -> int:
    from lmtrain.evaluation.heatmap import FORMATS, draw_recall
    from lmtrain.evaluation.recall import evaluate_recall, format_recall
    from lmtrain.evaluation.result import write_result
    from lmtrain.picture import check_picture

    for_texts = ("path", "context", "stride", "carry", "by_document", "by_context")
    _refuse(arguments, for_texts, f"for texts only; examples of {task.task.name} are scored whole")
    if arguments.prefixes and restored.model.causality == "strict":
        raise ValueError("--prefixes: this model is strict, its one pass is what every prefix says; leave it out")
    if arguments.plot:
        check_picture(arguments.plot, FORMATS)
    how: dict[str, Any] = {"prefixes": arguments.prefixes, "autocast": restored.autocast}
    result = evaluate_recall(restored.model, task, arguments.length or [task.length], arguments.examples, **how)
    row = result.to_json(restored.source)
    kept = write_result(restored.run, result.name, row)
    if arguments.plot:
        draw_recall(result, arguments.plot)
    show(arguments, lambda: row, lambda: format_recall(result))
    print(f"kept in {kept}", file=sys.stderr)
    return 0


def _refuse(arguments: argparse.Namespace, options: Sequence[str], reason: str) -> None:
    """ValueError for options that were given and have no effect here."""
    given = [f"--{option.replace('_', '-')}" for option in options if getattr(arguments, option)]
    if given:
        raise ValueError(f"{', '.join(given)}: {reason}")


def _compare(arguments: argparse.Namespace) -> int:
    from lmtrain.evaluation.run import Asked, compare_runs

    names = ("on", "path", "context", "stride", "carry")
    asked = Asked(**{name: getattr(arguments, name) for name in names})
    comparison = compare_runs(arguments.a, arguments.b, asked)
    show(arguments, comparison.to_json, comparison.format)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from lmtrain.generate import generate, printable
    from lmtrain.restore import open_run

    restored = open_run(arguments.run_dir)
    pieces = generate(
        restored.model,
        restored.tokenizer,
        arguments.prompt.encode(),
        length=arguments.length,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    print(arguments.prompt, end="")
    for text in printable(pieces):
        print(text, end="", flush=True)
    print()
    print(pieces.report(), file=sys.stderr)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from lmtrain.config import load, reload
    from lmtrain.inspect import Asked, inspect
    from lmtrain.rank_memory import bytes_of

    read = reload if Path(arguments.config).is_dir() else load
    memory = None if arguments.memory is None else bytes_of(arguments.memory)
    asked = Asked(arguments.world, arguments.sequence or 1, arguments.zero, memory)
    inspection = inspect(read(arguments.config, arguments.overrides), None if asked == Asked() else asked)
    show(arguments, inspection.to_json, inspection.format)
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from lmtrain.audit import audit
    from lmtrain.floor import STEPS, trial, trial_of
    from lmtrain.restore import model_to_audit
    from lmtrain.waiting import Waiting

    if arguments.steps and not arguments.floor:
        raise ValueError("--steps: an audit trains nothing without --floor")
    model, config = model_to_audit(arguments.config, arguments.overrides)
    report = audit(model, length=arguments.length or config.data.seq_len)
    if arguments.floor:
        small, changes = trial_of(config, arguments.steps or STEPS)
        report = replace(report, floor=trial(small, changes=changes, watch=Waiting()))
    show(arguments, report.to_json, report.format)
    return NO if report.leaks else 0


def _list(arguments: argparse.Namespace) -> int:
    from lmtrain.inspect import list_mixers

    listing = list_mixers(arguments.length)
    show(arguments, listing.to_json, listing.format)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from lmtrain.bench.order import read_order
    from lmtrain.bench.run import bench
    from lmtrain.bench.tune import tune

    config, overrides = arguments.config, arguments.overrides
    if config is not None and "=" in config and not Path(config).exists():  # no configuration, but a setting
        config, overrides = None, [config, *overrides]
    names = ("mixers", "lengths", "repeats", "seconds", "device", "out", "tune")
    order = read_order(config, overrides, **{name: getattr(arguments, name) for name in names})
    report = (tune if arguments.tune else bench)(order, lambda line: print(line, file=sys.stderr))
    show(arguments, report.to_json, report.format)
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    from lmtrain.checkpoint import verify
    from lmtrain.checkpoint.shelf import candidates

    path: Path = arguments.path
    if arguments.action != "list":
        _refuse(arguments, ("json",), "for the list only")
    if arguments.action == "export":
        from lmtrain.export import export  # with the whole model, which verifying does not need

        print(export(path, arguments.out))
        return 0
    if arguments.safetensors or arguments.out:
        raise ValueError(f"--safetensors and --out say how to export, not to {arguments.action}")
    if arguments.action == "list":
        return _list_checkpoints(arguments)
    if arguments.action == "repair":
        return _repair(path)
    paths = candidates(path / "checkpoints") if (path / "checkpoints").is_dir() else [path]
    if not paths or not all(p.is_dir() for p in paths):
        raise ValueError(f"{path}: no checkpoint there")
    found = [(p, verify(p)) for p in paths]
    for checkpoint, problems in found:
        print(f"{checkpoint}: {'intact' if not problems else 'DAMAGED: ' + '; '.join(problems)}")
    return NO if any(problems for _, problems in found) else 0


def _list_checkpoints(arguments: argparse.Namespace) -> int:
    from lmtrain.checkpoint.inventory import format_inventory, inventory
    from lmtrain.config import reload

    entries = inventory(_checkpoints_of(arguments.path), reload(arguments.path).checkpoint.keep)
    rows = {"run": str(arguments.path), "checkpoints": [entry.row for entry in entries]}
    show(arguments, lambda: rows, lambda: format_inventory(entries))
    return 0 if any(not entry.problems for entry in entries) else NO


def _repair(run: Path) -> int:
    from lmtrain.checkpoint.inventory import repair
    from lmtrain.run.lock import Lock

    folder = _checkpoints_of(run)
    try:
        lock = Lock(run / "lock")
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from None
    try:
        done = repair(folder)
    finally:
        lock.release()
    print(done.format())
    return 0 if done.newest else NO


def _checkpoints_of(run: Path) -> Path:
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"{run}: no run with checkpoints there")
    return run / "checkpoints"


def _launch(arguments: argparse.Namespace) -> int:
    from launch.slurm import Job, submit, write_script

    job = Job(arguments.nodes, arguments.processes, arguments.gpus, arguments.time, tuple(arguments.option))
    path = write_script(job, arguments.config, arguments.overrides, arguments.out)
    print(submit(path) if arguments.submit else f"{path}: {job.world} processes; submit it with sbatch {path}")
    return 0
