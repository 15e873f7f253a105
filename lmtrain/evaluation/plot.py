"""The losses of an evaluation as a picture: by the number of tokens seen, and by context length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmtrain.evaluation.result import Evaluation
from lmtrain.picture import draw_figure

FORMATS = (".svg",)


def draw(evaluation: Evaluation, path: Path) -> None:
    """Write the figure as SVG."""
    curves = 2 if evaluation.by_context else 1

    def fill(figure: Any) -> None:
        axes = figure.subplots(1, curves, squeeze=False)[0]
        _by_position(axes[0], evaluation)
        if evaluation.by_context:
            _by_context(axes[1], evaluation)
        p = evaluation.protocol
        how = f"carry {p.carry:,}" if p.context is None else f"context {p.context:,}, stride {p.stride:,}"
        figure.suptitle(f"{p.corpus} {p.split}, {p.scoring}, {how}, {p.documents}", fontsize="medium")

    draw_figure(path, (5.5 * curves, 3.6), fill)


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
