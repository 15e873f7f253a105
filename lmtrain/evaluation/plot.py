"""The losses of an evaluation as a picture: by the number of tokens seen, and by context length."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmtrain.evaluation.result import Evaluation


def check(path: Path) -> None:
    """ValueError if `draw` could not write there, so that nobody waits for a picture in vain."""
    if path.suffix != ".svg":
        raise ValueError(f"--plot: {path} should be named .svg, the format that is written")
    if path.exists():
        raise ValueError(f"--plot: {path} is there already; name another file")
    if not path.parent.is_dir():
        raise ValueError(f"--plot: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib, which is not installed; pip install 'lmtrain[plot]'")


def draw(evaluation: Evaluation, path: Path) -> None:
    """Write the figure as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    curves = 2 if evaluation.by_context else 1
    with matplotlib.rc_context({"svg.hashsalt": "lmtrain", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.5 * curves, 3.6), layout="constrained")
        axes = figure.subplots(1, curves, squeeze=False)[0]
        _by_position(axes[0], evaluation)
        if evaluation.by_context:
            _by_context(axes[1], evaluation)
        p = evaluation.protocol
        how = f"carry {p.carry:,}" if p.context is None else f"context {p.context:,}, stride {p.stride:,}"
        figure.suptitle(f"{p.corpus} {p.split}, {p.scoring}, {how}, {p.documents}", fontsize="medium")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _by_position(axes: Any, evaluation: Evaluation) -> None:
    """A bar for each bucket, as wide as the tokens seen that it stands for."""
    buckets = evaluation.by_position
    axes.stairs([b.loss for b in buckets], [max(1, buckets[0].start), *(b.stop for b in buckets)], baseline=None)
    _name(axes, [b.stop for b in buckets], "tokens seen")


def _by_context(axes: Any, evaluation: Evaluation) -> None:
    """A point for each context; hollow beyond the length of training."""
    points = evaluation.by_context
    axes.plot([p.context for p in points], [p.loss for p in points], color="C0")
    for beyond, face in ((False, "C0"), (True, "white")):
        some = [p for p in points if p.beyond_training == beyond]
        label = "longer than in training" if beyond else "same targets at each context"
        if some:
            axes.plot([p.context for p in some], [p.loss for p in some], "o", color="C0", mfc=face, label=label)
    axes.legend(frameon=False, fontsize="small")
    _name(axes, [p.context for p in points], "context, tokens")


def _name(axes: Any, ticks: list[int], what: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    axes.minorticks_off()
    axes.set(xlabel=what, ylabel="nats per token")
