"""A watch over the ranks: one that stands still, fails or is gone ends the job, soon and with the reason.

Who waits in a collective for a rank that does not come waits for ever, or fails with words about a socket. So each
process has a thread that tells the others, PERIOD by PERIOD, that the process lives and how far its main thread has
come, and that ends the process, be its main thread stuck or not,

* when a rank has told nothing for `seconds`: it was stopped, or it is gone;
* when no rank's main thread has come any further for `seconds`; those least far have not come;
* GRACE after another rank told that it failed, if the main thread has not noticed by then.

They talk through the store by which the ranks found each other, never through a collective.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, Self

from parallel.agree import AgreedError
from parallel.world import World

PERIOD = 0.5
LISTEN = 5.0
"""Seconds of silence after which a rank is to blame for what fails on another one."""
GRACE = 20.0
"""Seconds that the main thread has to end a process by itself; launchers give 30."""
FAILED = 1
"""The exit code of a process that the watch ends."""
STORE_GONE = "the store that the ranks share is gone, and with it rank 0 or the launcher that keeps it"
_REASON = "watch/failed"


class Said(NamedTuple):
    """What a rank tells the others: how often it has, how often its main thread came further, and where that is."""

    ticks: int
    came: int
    place: str


class Watchdog:
    """The watch of one rank. `on_failure` is told why the job ends, on the lowest rank that is left; `at` says how far
    the main thread has come. Alone there is nobody to watch, and no thread."""

    def __init__(self, world: World, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.world, self.seconds, self.clock = world, seconds, clock
        self.on_failure: Callable[[str], None] = lambda reason: None
        self._place, self._count, self._ticks = "the start", 0, 0
        self._others = [rank for rank in range(world.size) if rank != world.rank]
        self._heard: dict[int, tuple[float, Said]] = {}  # when each rank last told something new, and what
        self._progress = 0.0  # when a main thread last came further
        self._looked = 0.0
        self._failed_since: float | None = None
        self._telling, self._told, self._ending = threading.Lock(), False, False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, place: str) -> None:
        """The main thread has come to `place`: the longest way from one place to the next is what `seconds` must allow.

        Before the first place, ranks may be as slow as they like, if they live.
        """
        self._place = place
        self._count += 1

    def fail(self, reason: str) -> str:
        """This rank ends, for `reason`. Why the job ends: for that, unless another rank is the cause.

        What this process has left to do must end within seconds, for others may be gone.
        """
        if self.world.size > 1:
            self._ending = True
            faulthandler.dump_traceback_later(LISTEN + GRACE, exit=True)
            reason = self._agreed(self._cause() or f"{self._here()}: {reason}")
        self._tell(reason)
        return reason

    def __enter__(self) -> Self:
        if self.world.size > 1:
            assert self.world.store is not None
            self._store = self.world.store.clone()  # type: ignore[attr-defined]
            self._store.set_timeout(timedelta(seconds=max(self.seconds, 1.0)))
            self._say()
            self.world.barrier()
            self._look()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, AgreedError):
            return  # it watches to the last moment: others may be gone, and ending may hang
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
        self.world.barrier()  # a launcher ends whoever is at work when the first process leaves

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            if not self._ending:  # a store that is gone, its cable cut, may keep us for ever
                faulthandler.dump_traceback_later(self.seconds + GRACE, exit=True)
            try:
                self._say()
                reason = self._look()
            except RuntimeError as error:
                reason = f"{STORE_GONE} ({error}); {self._here()}"
            if reason is not None and not self._over.is_set():
                self._end(reason)

    def _say(self) -> None:
        self._ticks += 1
        came = self._count + self.world.calls.number if self._count else 0
        self._store.set(f"watch/{self.world.rank}", json.dumps(Said(self._ticks, came, self._place)))

    def _read(self) -> list[Said]:
        words = self._store.multi_get([f"watch/{rank}" for rank in range(self.world.size)])
        return [Said(*json.loads(each)) for each in words]

    def _look(self) -> str | None:
        """Read what all ranks told; why the job must end, if it must."""
        now, known = self.clock(), self._heard
        if not known or now - self._looked > 10 * PERIOD:  # at first; or this process was stopped itself
            known, self._progress = {}, now
        heard = {}
        for rank, said in enumerate(self._read()):
            when, before = known.get(rank, (now, said))
            heard[rank] = (when if said == before else now, said)
            self._progress = now if said.came != before.came else self._progress
        self._heard, self._looked = heard, now  # at once: the main thread reads it, too
        if silent := [rank for rank, (when, _) in self._heard.items() if now - when > self.seconds]:
            return (
                f"nothing was heard for {self.seconds:g} s of {self._named(silent)}: stopped, or gone; {self._here()}"
            )
        if min(said.came for _, said in self._heard.values()) and now - self._progress > self.seconds:
            return self._stuck()
        if self._store.check([_REASON]):
            self._failed_since = self._failed_since or now
            return self._store.get(_REASON).decode() if now - self._failed_since > GRACE else None
        return None

    def _stuck(self) -> str:
        counts = {rank: said.came for rank, (_, said) in self._heard.items()}
        behind = [rank for rank, count in counts.items() if count == min(counts.values())]
        if len(behind) == self.world.size:
            return f"no rank came any further for {self.seconds:g} s: all are at {self._place}"
        return f"{self._named(behind)} did not come any further for {self.seconds:g} s, and others wait; {self._here()}"

    def _named(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank} (last seen at {self._heard[rank][1].place})" for rank in ranks)

    def _here(self) -> str:
        return f"rank {self.world.rank} is at {self._place}"

    def _cause(self) -> str | None:
        """Why another rank is to blame for what went wrong on this one; waits until it is known."""
        try:
            before, began = self._read(), self.clock()
            while self.clock() < began + LISTEN:
                if self._store.check([_REASON]):
                    return self._store.get(_REASON).decode()
                now = self._read()
                silent = [rank for rank in self._others if now[rank].ticks == before[rank].ticks]
                if not silent:
                    return None
                time.sleep(PERIOD / 5)
        except RuntimeError as error:
            return f"{STORE_GONE} ({error}); {self._here()}"
        return f"{self._named(silent)} ended without a word; {self._here()}"

    def _agreed(self, reason: str) -> str:
        """The first reason that any rank had."""
        try:
            return self._store.compare_set(_REASON, "", reason).decode()
        except RuntimeError:
            return reason

    def _tell(self, reason: str) -> None:
        """To the user, once, from the lowest rank that is left."""
        with self._telling:
            since = self.clock() - min(4 * PERIOD, self.seconds)
            lower = [rank for rank in self._others if rank < self.world.rank]
            if not self._told and all(self._heard[rank][0] <= since for rank in lower):
                self._told = True
                self.on_failure(reason)

    def _end(self, reason: str) -> None:
        self._ending = True
        faulthandler.dump_traceback_later(GRACE, exit=True)  # should the disk or the store hang, too
        reason = self._agreed(reason)
        print(f"rank {self.world.rank} ends at {self._place}: {reason}; its threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self._tell(reason)
        os._exit(FAILED)
