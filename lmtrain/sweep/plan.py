"""The plan of a sweep: its runs and what they cost together, for people and machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmtrain.sweep.runs import Run
from lmtrain.sweep.spec import Spec
from lmtrain.table import table


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep, parents first."""

    spec: Spec
    runs: tuple[Run, ...]

    @property
    def flops(self) -> float:
        """Of all training."""
        return sum(run.own_flops for run in self.runs)

    @property
    def far_off(self) -> list[Run]:
        """Those whose cost is not close to that of their reference."""
        return [run for run in self.runs if run.solved is not None and not run.solved.is_close]

    def to_json(self, flops_per_second: float) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.spec.name,
            "runs": [_row(run, flops_per_second) for run in self.runs],
            "flops": self.flops,
            "seconds": self.flops / flops_per_second,
            "disk_bytes": sum(run.disk_bytes for run in self.runs),
            "flops_per_second": flops_per_second,
        }

    def format(self, flops_per_second: float, source: str) -> str:
        """For people; source: where the speed comes from."""
        matched = self.spec.match is not None
        head = ["hash", "run", "N", "D", "FLOPs", "pairs", "state bytes", "seconds", "disk"]
        rows = [
            [*_cells(run, flops_per_second), *_matched(run)] if matched else _cells(run, flops_per_second)
            for run in self.runs
        ]
        lines = [table([*head, "solved", "residual"] if matched else head, rows), ""]
        seconds, disk = self.flops / flops_per_second, sum(run.disk_bytes for run in self.runs)
        lines.append(
            f"{len(self.runs)} runs, {self.flops:.3g} FLOPs, about {duration(seconds)} one after the other "
            f"at {flops_per_second:.2g} FLOP/s ({source}), {disk / 1e9:.2f} GB of checkpoints"
        )
        if self.far_off:
            lines.append(
                f"not equal: {len(self.far_off)} runs cost more than 1 % less than their reference (marked !); "
                "a setting with smaller steps matches better, as model.ffn_dim or narrower heads"
            )
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for unit, name in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _row(run: Run, flops_per_second: float) -> dict[str, Any]:
    solved = run.solved
    return {
        "hash": run.hash,
        "name": run.name,
        "axes": run.axes,
        "parameters": run.parameters,
        "parameters_total": run.cost.cost.parameters,
        "tokens": run.tokens,
        "flops": run.flops,
        "own_flops": run.own_flops,
        "flops_per_token": run.per_token(run.cost.cost.flops),
        "pairs": run.per_token(run.cost.cost.pairs),
        "state_bytes": run.cost.cost.state_bytes,
        "seconds": run.own_flops / flops_per_second,
        "disk_bytes": run.disk_bytes,
        "strict": run.cost.strict,
        "parent": None if run.parent is None else run.parent.name,
        "trunk": run.is_trunk,
        "solved": None if solved is None else {solved.key: solved.value},
        "residual": None if solved is None else solved.residual,
        "command": f"lmtrain train {' '.join(run.words)}",
    }


def _cells(run: Run, flops_per_second: float) -> list[str]:
    cost = run.cost.cost
    return [
        run.hash,
        run.name,
        f"{run.parameters:,}",
        f"{run.tokens:,}",
        f"{run.own_flops:.3g}",
        f"{run.per_token(cost.pairs):,.0f}",
        f"{cost.state_bytes:,.0f}",
        f"{run.own_flops / flops_per_second:,.0f}",
        f"{run.disk_bytes / 1e6:,.0f} MB",
    ]


def _matched(run: Run) -> list[str]:
    if run.solved is None:
        return ["", ""]
    mark = "" if run.solved.is_close else " !"
    return [f"{run.solved.key.split('.')[-1]}={run.solved.value}", f"{run.solved.residual:.2%}{mark}"]
