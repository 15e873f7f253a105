"""One process at a time: the lock of a run folder.

Two things together. A `flock` on the open file, which the kernel frees however its holder ends; and in the
file who holds it, for the message to the one who comes second, and for file systems without a working
`flock`.

On a network file system `flock` may act within one host only (NFS mounted `nolock`, Lustre `localflock`): two
hosts could then take the same run without seeing each other. Where `flock` does not exist at all, a holder on
another host is believed to live until its lock file is removed by hand.
"""

import fcntl
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; `started` tells it from a later one with its pid."""

    host: str
    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "Holder":
        """The process of this host with this pid."""
        return cls(socket.gethostname(), pid, _start_time(pid))

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Whom the lock file at `path` names; None if nobody, or nobody that can be made out."""
        try:
            content = json.loads(path.read_text())
            return cls(str(content["host"]), int(content["pid"]), str(content["started"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def alive(self) -> bool:
        """Whether the process still runs; of one on another host nothing is known, and it is taken to."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):  # a pid beyond all pids
            return False
        except PermissionError:
            pass  # it lives and is another user's
        return _start_time(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """Takes the lock at `path`, or raises ValueError naming who holds it.

    `previous` is the holder before, if it ended without releasing it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self.previous = self._take(path)
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _take(self, path: Path) -> Holder | None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"in use by {_describe(Holder.read(path))}") from None
        except OSError as error:
            if (holder := Holder.read(path)) and holder.alive():
                hint = f"if that has ended, remove {path}"
                raise ValueError(f"in use by {holder}; {hint} ({error.strerror})") from None
        holder = Holder.read(path)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(asdict(Holder.of(os.getpid()))).encode(), 0)
        return holder


def _describe(holder: Holder | None) -> str:
    if holder is None:
        return "another process"
    return str(holder) if holder.alive() else f"a child of {holder}, which has ended itself"


def _start_time(pid: int) -> str:
    """When a process of this host started, in a form that no clock change touches; "" if it ended.

    Without Linux's /proc it is "" for all: then a process is known by its pid alone.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # proc(5): field 2 is a name that may hold blanks, 3 the state, 22 the start in ticks since boot
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"
