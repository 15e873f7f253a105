"""Pictures by matplotlib: refused before the work that they would show, and the same bytes each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_picture(path: Path, formats: Sequence[str]) -> None:
    """ValueError, naming the option --plot, for a picture that could not be written there. formats: `.svg`, ..."""
    if path.suffix not in formats:
        raise ValueError(f"--plot: {path} should be named {formats[0]}: what is drawn ends in {' or '.join(formats)}")
    if path.exists():
        raise ValueError(f"--plot: {path} is there already; name another file")
    if not path.parent.is_dir():
        raise ValueError(f"--plot: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib, which is not installed; pip install 'lmtrain[plot]'")


def draw_figure(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Write a figure of `size` inches that `draw` fills, in the format of the name. ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "lmtrain", "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(path, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
