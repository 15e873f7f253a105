"""Accuracy over depth and length as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmtrain.evaluation.recall import Recall, rows_of, variant_names
from lmtrain.picture import draw_figure

FORMATS = (".svg", ".png")


def draw_recall(recall: Recall, path: Path) -> None:
    """Write the heat map of a result: a row for each length, a column for each variant of the task."""
    grid = [[cell.accuracy for cell in cells] for cells in rows_of(recall)]
    rows = [f"{length:,}" for length in recall.lengths]
    draw_grids({recall.corpus: grid}, rows, variant_names(recall), path, row_label="tokens", column_label="")


def draw_grids(
    grids: dict[str, list[list[float]]],
    rows: list[str],
    columns: list[str],
    path: Path,
    *,
    row_label: str,
    column_label: str,
) -> None:
    """Write several heat maps of shares from 0 to 1 beside each other, each number in its place, under its title.

    Raises ImportError without matplotlib.
    """
    across = min(4, len(grids))
    down = -(-len(grids) // across)

    def fill(figure: Any) -> None:
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        for at, (title, grid) in zip(axes, grids.items(), strict=False):
            image = _draw_grid(at, title, grid, rows, columns)
            at.set(xlabel=column_label, ylabel=row_label)
        for unused in axes[len(grids) :]:
            unused.set_axis_off()
        figure.colorbar(image, ax=axes, label="accuracy")

    draw_figure(path, (1.2 + across * (0.8 + 0.5 * len(columns)), 0.4 + down * (1.1 + 0.4 * len(rows))), fill)


def _draw_grid(axes: Any, title: str, grid: list[list[float]], rows: list[str], columns: list[str]) -> Any:
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, line in enumerate(grid):
        for column, share in enumerate(line):
            colour = "white" if share < 0.6 else "black"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize="x-small")
    axes.set_title(title, fontsize="small")
    axes.set_xticks(range(len(columns)), columns, fontsize="x-small", rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows, fontsize="x-small")
    return image
