"""How the runs of a sweep stand: done, running, failed, queued; and how long the rest will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from lmtrain.run import read_metrics
from lmtrain.sweep.folder import State, SweepFolder
from lmtrain.sweep.pace import pace_of
from lmtrain.sweep.plan import Plan, duration
from lmtrain.sweep.runs import Run
from lmtrain.table import table


@dataclass(frozen=True)
class RunStanding:
    """One run: step of the newest row of its metrics; note: its result, or why it failed."""

    run: Run
    state: State
    step: int
    note: str

    @property
    def flops_left(self) -> float:
        """Of its own training."""
        if self.state == "done":
            return 0.0
        steps = self.run.config.train.steps
        return self.run.flops * (steps - max(self.step, self.run.begins)) / steps


@dataclass(frozen=True)
class Standing:
    """All runs, and the pace at which the rest goes on. workers: at work now."""

    runs: list[RunStanding]
    flops_per_second: float
    source: str

    def count(self, state: State) -> int:
        """Runs in this state."""
        return sum(each.state == state for each in self.runs)

    @property
    def seconds_left(self) -> float:
        """Until all but the failed are done, with as many at work as now, at least one."""
        flops = sum(each.flops_left for each in self.runs if each.state != "failed")
        return flops / self.flops_per_second / max(1, self.count("running"))

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        rows = [
            {"name": each.run.name, "hash": each.run.hash, "state": each.state, "step": each.step}
            | {"steps": each.run.config.train.steps, "note": each.note}
            for each in self.runs
        ]
        counts = {state: self.count(state) for state in get_args(State)}
        return {**counts, "seconds_left": self.seconds_left, "runs": rows}

    def format(self) -> str:
        """For people."""
        rows = [
            [each.run.name, each.run.hash, each.state, f"{each.step}/{each.run.config.train.steps}", each.note]
            for each in self.runs
        ]
        counts = ", ".join(f"{self.count(state)} {state}" for state in get_args(State))
        left = f"; about {duration(self.seconds_left)} left ({self.source})" if self.seconds_left else ""
        return f"{table(['run', 'hash', 'state', 'step', ''], rows)}\n\n{counts}{left}"


def standing_of(plan: Plan, folder: SweepFolder) -> Standing:
    """As the folder says now. ValueError if a file of it cannot be read."""
    return Standing([_standing(run, folder) for run in plan.runs], *pace_of(plan, folder))


def _standing(run: Run, folder: SweepFolder) -> RunStanding:
    state, note = folder.state(run), ""
    if state == "done" and (result := folder.result(run)) is not None:
        note = f"loss {result.loss:.4f}"
    elif state == "failed" and (failure := folder.failure(run)) is not None:
        note = failure.reason
    steps = [row["step"] for row in read_metrics(folder.of(run))]
    return RunStanding(run, state, max(steps, default=0), note)
