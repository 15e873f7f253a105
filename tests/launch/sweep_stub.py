"""Stands in for `lmtrain train` and `lmtrain eval`: it writes what they write, without torch, and fails as told.

    python sweep_stub.py PLANS train CONFIG key=value ... run.dir=FOLDER
    python sweep_stub.py PLANS eval FOLDER --json

PLANS: a folder; NAME in it holds how the attempts of the run whose folder begins with NAME end, one word each: done,
crash, wrong, memory, killed, slow. After the last word they are done.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(plans: Path, verb: str, *words: str) -> None:
    """Do as the verb."""
    if verb == "eval":
        scores = {"loss": 2.0, "bits_per_byte": 2.9, "causality": "strict", "scoring": "one-pass"}
        print(json.dumps(scores))
        return
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    folder = Path(settings["run.dir"])
    (plan,) = [path for path in plans.iterdir() if folder.name.startswith(path.name)] or [plans / "none"]
    ends = plan.read_text().split() if plan.exists() else []
    log = folder.parent / f"attempts-{folder.name}.txt"
    attempt = len(log.read_text().splitlines()) if log.exists() else 0
    with open(log, "a") as file:
        print(*words, os.environ["OMP_NUM_THREADS"], file=file)
    assert not any(folder.glob("*")) or (folder / "status.json").exists(), "as lmtrain refuses it"
    folder.mkdir(exist_ok=True)
    steps = int(settings["train.steps"])
    status = {"state": "running", "step": 0, "checkpoint": None, "reason": ""}
    (folder / "status.json").write_text(json.dumps(status))
    end(ends[attempt] if attempt < len(ends) else "done")
    config = Path(words[0]).read_text().replace("seq_len: 32", "seq_len: 32, path: text.txt")
    (folder / "config.yaml").write_text(config)
    (folder / "environment.json").write_text("{}")
    row = {"step": steps, "tokens": steps * 128, "tokens_per_second": 64.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "events.jsonl").write_text('{"event": "memory", "peak_memory": 1000}\n')
    (folder / "checkpoints" / f"step-{steps}").mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps(status | {"state": "done", "step": steps}))


def end(how: str) -> None:
    """As the plan says, unless it is done."""
    if how == "crash":
        sys.exit("Traceback (most recent call last):\nRuntimeError: it broke")
    if how == "wrong":
        print("train.steps=3: a mistake", file=sys.stderr)
        sys.exit(2)
    if how == "memory":
        sys.exit("RuntimeError: [enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow":
        time.sleep(600)


main(Path(sys.argv[1]), *sys.argv[2:])
