"""What each verb takes: its arguments and options, and their words of help."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


def add_config(sub: argparse.ArgumentParser, what: str) -> None:
    sub.add_argument("config", help=what)
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go before those of the file")


def add_train(sub: argparse.ArgumentParser) -> None:
    add_config(sub, "a YAML file, or the name of a shipped configuration (demo, enwik8/local)")
    sub.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="start run.dir from this checkpoint")
    sub.add_argument(
        "--fresh", action="store_true", help="if all checkpoints of run.dir are damaged, begin again beside them"
    )


def add_prepare(sub: argparse.ArgumentParser) -> None:
    add_config(sub, "a YAML file, a shipped configuration, or the name of a corpus")
    sub.add_argument("--workers", type=positive, metavar="N", help="processes that tokenize (one for each processor)")
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_eval(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_dir", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    add_protocol(sub, "the run's own validation split")
    of_leaking = "of a model that selects ahead: how many prefixes are scored alone (as many as cost little)"
    sub.add_argument("--prefixes", type=positive, metavar="N", help=of_leaking)
    sub.add_argument("--by-document", action="store_true", help="also the numbers of each document")
    by_context = "also the loss of the same tokens at contexts of 128, 256, ... up to --context"
    sub.add_argument("--by-context", action="store_true", help=by_context)
    losses = "draw the losses by position and by context; of a task a heat map, also as .png"
    sub.add_argument("--plot", type=Path, metavar="FILE.svg", help=losses)
    sub.add_argument("--length", type=lengths, metavar="N,N", help="of a task's examples (data.seq_len)")
    sub.add_argument("--examples", type=positive, metavar="N", help="of a task, for each length and depth")
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_compare(sub: argparse.ArgumentParser) -> None:
    for name, which in (("a", "one"), ("b", "the other")):
        what = f"{which}: a run's folder, a checkpoint, or a file that eval --by-document kept"
        sub.add_argument(name, type=Path, metavar=f"RUN_{name.upper()}", help=what)
    add_protocol(sub, "the validation split of the runs")
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_protocol(sub: argparse.ArgumentParser, default: str) -> None:
    """Which text is scored, and how."""
    sub.add_argument("--on", metavar="CORPUS[:SPLIT]", help=f"what to score ({default})")
    sub.add_argument("--path", help="file of that corpus")
    sub.add_argument("--context", type=positive, help="most tokens that a scored token may see")
    sub.add_argument("--stride", type=positive, help="new tokens scored per window (context)")
    sub.add_argument("--carry", action="store_true", help="carry the state through the text; no windows")


def add_generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_dir", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    sub.add_argument("--prompt", default="", help="text to go on from")
    sub.add_argument("--length", type=positive, default=500, help="tokens to write (500)")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 = always the likeliest token (1.0)")
    sub.add_argument("--top-k", type=positive, help="draw from the k likeliest tokens")
    sub.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability")
    sub.add_argument("--seed", type=int, help="the same seed writes the same text")


def add_inspect(sub: argparse.ArgumentParser) -> None:
    add_config(sub, "a YAML file, a shipped configuration, or a run's folder")
    sub.add_argument("--world", type=positive, metavar="N", help="what each of N ranks takes")
    sub.add_argument("--sequence", type=positive, metavar="P", help="of which P share a row (1)")
    sub.add_argument("--zero", type=int, choices=range(4), help="stage of ZeRO, 0 = torch (as configured)")
    sub.add_argument("--memory", metavar="80GB", help="of each device: find the smallest setting that fits")
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_audit(sub: argparse.ArgumentParser) -> None:
    add_config(sub, "a YAML file or shipped configuration (fresh weights), or a run's folder (its weights)")
    sub.add_argument("--length", type=positive, help="tokens of the test sequences")
    floor = "also train a small model of these mixers on letters that nobody can predict; minutes"
    sub.add_argument("--floor", action="store_true", help=floor)
    sub.add_argument("--steps", type=positive, help="of that training (1500)")
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_bench(sub: argparse.ArgumentParser) -> None:
    what = "whose mixers to measure: a YAML file, a shipped configuration, or a run's folder (every registered mixer)"
    sub.add_argument("config", nargs="?", help=what)
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go before those of the file")
    sub.add_argument("--mixers", type=words, default=[], metavar="NAME,NAME", help="only these")
    sub.add_argument("--lengths", type=lengths, default=[], metavar="N,N", help="in tokens (1024 to 8192 on a CPU)")
    sub.add_argument("--repeats", type=positive, help="of each timing (5 on a CPU, 20 on a GPU)")
    limit = "lengths that do not fit into this time are skipped (120; no limit with --lengths)"
    sub.add_argument("--seconds", type=positive, help=limit)
    sub.add_argument("--device", choices=["cpu", "cuda"], help="where (the GPU, if there is one)")
    sub.add_argument("--out", metavar="FOLDER", help="for bench.json, bench.csv and bench.svg (a new one in bench/)")
    sub.add_argument("--tune", action="store_true", help="instead, find the fastest kernel settings for these heads")
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_checkpoint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("action", choices=["list", "verify", "repair", "export"], help="`repair` moves damaged ones aside")
    which = "a run (all of its checkpoints; to export: its newest), or to verify or export a checkpoint"
    sub.add_argument("path", type=Path, help=which)
    sub.add_argument("--json", action="store_true", help="of list: one JSON object on stdout")
    sub.add_argument("--safetensors", action="store_true", help="the format of the export, so far the only one")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="a new one for the export (export/step-N of the run)")


def add_launch(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("scheduler", choices=["slurm"])
    add_config(sub, "as of `lmtrain train`")
    sub.add_argument("--nodes", type=positive, default=1, help="machines (1)")
    sub.add_argument("--processes", type=positive, default=1, metavar="N", help="on each machine (1)")
    sub.add_argument("--gpus", action="store_true", help="a GPU for each process")
    sub.add_argument("--time", default="24:00:00", help="limit of the job (24:00:00); it saves before")
    sub.add_argument(
        "--option", action="append", default=[], help="one more option of sbatch: --option=--partition=long"
    )
    sub.add_argument("--out", type=Path, default=Path("train.slurm"), help="the script (train.slurm)")
    sub.add_argument("--submit", action="store_true", help="also hand it to sbatch")


def words(text: str) -> list[str]:
    return text.split(",")


def lengths(text: str) -> list[int]:
    return [positive(word) for word in text.split(",")]
