"""The faults of a soak (benchmarks/soak.py): some end a life of its run, others damage its folder between two lives.

The first line of each function is its name in the results.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from soak_run import Soak

from launch.cli import CRASHED, STOPPED, USER_ERROR
from lmtrain import checkpoint
from lmtrain.checkpoint.shelf import candidates, step_of

CHECKPOINT_BYTES = 600_000  # of this model, about

# The faults that end a life.


def killed(soak: Soak) -> None:
    """`kill -9` at any moment"""
    process = soak.start_and_wait()
    process.kill()
    soak.expect(process, -signal.SIGKILL)


def terminated(soak: Soak) -> None:
    """SIGTERM"""
    process = soak.start_and_wait()
    soak.ask(process, signal.SIGTERM)


def interrupted(soak: Soak) -> None:
    """Ctrl-C"""
    process = soak.start_and_wait()
    soak.ask(process, signal.SIGINT)


def terminated_and_killed(soak: Soak) -> None:
    """SIGTERM, and `kill -9` before it has saved"""
    asked_twice(soak, signal.SIGKILL, 0.2)


def terminated_twice(soak: Soak) -> None:
    """SIGTERM twice"""
    asked_twice(soak, signal.SIGTERM, 0.1)


def killed_in_a_save(soak: Soak) -> None:
    """`kill -9` at any byte of a save"""
    process = soak.start(fault=f"save:bytes={soak.rng.randrange(3 * CHECKPOINT_BYTES)}")
    soak.expect(process, -signal.SIGKILL)


def killed_around_a_save(soak: Soak) -> None:
    """`kill -9` before a save's commit, `latest` or retention"""
    process = soak.start(fault=f"save:before={soak.rng.choice(('commit', 'latest', 'retention'))}")
    soak.expect(process, -signal.SIGKILL)


def raised(soak: Soak) -> None:
    """an exception in a step"""
    process = soak.start(fault=f"step={max(soak.newest, 0) + soak.rng.randrange(1, 50)}:raise")
    soak.expect(process, CRASHED)


def stood_still(soak: Soak) -> None:
    """SIGSTOP, SIGCONT, and `kill -9`"""
    process = soak.start()
    for _ in range(3):
        soak.sleep(process, soak.rng.uniform(0.0, 2.0))
        process.send_signal(signal.SIGSTOP)
        time.sleep(soak.rng.uniform(0.0, 1.0))
        process.send_signal(signal.SIGCONT)
    process.kill()
    soak.expect(process, -signal.SIGKILL)


def out_of_time(soak: Soak) -> None:
    """`train.max_time`"""
    process = soak.start(f"train.max_time={soak.rng.randint(2, 10)}s")
    soak.expect(process, STOPPED)
    soak.expect_saved()


def full_for_a_while(soak: Soak) -> None:
    """files that may not grow for a while (RLIMIT_FSIZE), then SIGTERM"""
    process = soak.start()
    with files_may_not_grow(soak, process):
        soak.sleep(process, soak.rng.uniform(0.0, 3.0))
    soak.sleep(process, soak.rng.uniform(0.0, 1.0))
    soak.ask(process, signal.SIGTERM)


def full_and_killed(soak: Soak) -> None:
    """files that may not grow (RLIMIT_FSIZE), and `kill -9` then or just after"""
    process = soak.start()
    with files_may_not_grow(soak, process):
        soak.sleep(process, soak.rng.uniform(0.0, 3.0))
        if soak.rng.random() < 0.5:
            process.kill()
    soak.sleep(process, soak.rng.uniform(0.0, 0.3))
    process.kill()
    soak.expect(process, -signal.SIGKILL)


def full_to_the_end(soak: Soak) -> None:
    """files that may not grow (RLIMIT_FSIZE), and SIGTERM meanwhile"""
    process = soak.start()
    with files_may_not_grow(soak, process):
        process.terminate()
        soak.expect(process, CRASHED, STOPPED)


def a_second_process(soak: Soak) -> None:
    """the same command while the run is at work, then `kill -9`"""
    process = soak.start()
    soak.wait_for_steps(process)
    soak.expect(soak.launch(soak.run), USER_ERROR)
    process.kill()
    soak.expect(process, -signal.SIGKILL)


def asked_twice(soak: Soak, second: signal.Signals, within: float) -> None:
    """SIGTERM, and up to `within` seconds later another signal, which may come too late."""
    process = soak.start_and_wait()
    process.terminate()
    time.sleep(soak.rng.uniform(0.0, within))
    process.send_signal(second)
    soak.expect(process, -second, -signal.SIGTERM, STOPPED)


@contextmanager
def files_may_not_grow(soak: Soak, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Within the body, no file beyond some length, once it trains: rows, checkpoints or both."""
    soak.wait_for_steps(process)
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soak.rng.randrange(CHECKPOINT_BYTES), unlimited))
    try:
        yield
    finally:
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))


# What may happen between two lives; each says whether it could.


def a_flipped_bit(soak: Soak) -> bool:
    """a flipped bit in the newest checkpoint"""
    path = file_of_the_newest(soak)
    if path is None:
        return False
    content = bytearray(path.read_bytes())
    content[soak.rng.randrange(len(content))] ^= 1 << soak.rng.randrange(8)
    path.write_bytes(content)
    return True


def a_cut_file(soak: Soak) -> bool:
    """a cut or empty file in the newest checkpoint"""
    path = file_of_the_newest(soak)
    if path is None:
        return False
    os.truncate(path, soak.rng.choice((0, soak.rng.randrange(path.stat().st_size))))
    return True


def a_missing_file(soak: Soak) -> bool:
    """a file of the newest checkpoint is missing"""
    path = file_of_the_newest(soak)
    if path is None:
        return False
    path.unlink()
    return True


def all_damaged(soak: Soak) -> bool:
    """every checkpoint is damaged: refused with 2, and begun again only once they are there again"""
    kept = [path / "state.json" for path in candidates(soak.run / "checkpoints")]
    if not kept:
        return False
    away = [(path, path.with_name("away")) for path in kept if path.exists()]
    for path, other in away:
        path.rename(other)
    soak.expect(soak.start(), USER_ERROR)
    for path, other in away:
        other.rename(path)
    return True


def a_wrong_latest(soak: Soak) -> bool:
    """`latest` is missing, stale, dangling or garbage"""
    latest = soak.run / "checkpoints/latest"
    latest.parent.mkdir(parents=True, exist_ok=True)
    latest.unlink(missing_ok=True)
    how = soak.rng.randrange(4)
    if how == 0:
        latest.symlink_to("nowhere")
    elif how < 3:
        latest.write_bytes((b"step-999999999\n", soak.rng.randbytes(50))[how - 1])
    return True


def leftovers(soak: Soak) -> bool:
    """folders and files of interrupted saves lie about"""
    folder = soak.run / "checkpoints"
    known = candidates(folder)
    if not known:
        return False
    for kind in ("tmp", "trash"):
        shutil.copytree(known[-1], folder / f"step-{soak.newest + 1}.{kind}-{soak.rng.randrange(16**8):08x}")
    (soak.run / f"status.json.tmp-{soak.rng.randrange(16**8):08x}").write_text('{"state": "do')
    return True


def a_torn_row(soak: Soak) -> bool:
    """the last rows are torn"""
    path = soak.run / soak.rng.choice(("metrics.jsonl", "events.jsonl"))
    if not path.exists():
        return False
    with open(path, "ab") as file:
        file.write(b'{"step": 12345678, "lo')
    return True


def no_tokens(soak: Soak) -> bool:
    """the prepared tokens are gone"""
    shutil.rmtree(soak.folder / "cache", ignore_errors=True)
    return True


def file_of_the_newest(soak: Soak) -> Path | None:
    """Any file of the newest checkpoint, if there is one before it to go on from."""
    intact = [path for path in candidates(soak.run / "checkpoints") if not checkpoint.verify(path)]
    if len(intact) < 2:
        return None
    soak.newest = step_of(intact[1])
    return soak.rng.choice(sorted(intact[0].iterdir()))


ENDS: dict[Callable[[Soak], None], int] = {
    killed: 5, terminated: 4, interrupted: 2, terminated_and_killed: 2, terminated_twice: 1, killed_in_a_save: 3,
    killed_around_a_save: 2, raised: 1, stood_still: 1, out_of_time: 1, full_for_a_while: 2, full_and_killed: 2,
    full_to_the_end: 1, a_second_process: 1,
}  # fmt: skip
BETWEEN: dict[Callable[[Soak], bool], int] = {
    a_flipped_bit: 4, a_cut_file: 2, a_missing_file: 1, all_damaged: 1, a_wrong_latest: 2, leftovers: 2,
    a_torn_row: 2, no_tokens: 1,
}  # fmt: skip
"""How often each comes, as weights."""
