"""TensorBoard: a mirror of metrics.jsonl. If it fails, the run goes on without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmtrain.progress import Pace


def curves_of_step(row: dict[str, Any], seen: Pace) -> dict[str, float]:
    """Tag -> value, of a training step's row of metrics.jsonl and its pace."""
    mark = "" if row["causality"] == "strict" else "_sees_ahead"
    curves = {f"train/loss{mark}": row["loss"]}
    if seen.bits_per_byte is not None:
        curves[f"train/bpb{mark}"] = seen.bits_per_byte
    curves |= {f"train/{key}": row[key] for key in ("lr", "grad_norm", "tokens", "skipped")}
    curves |= {f"perf/{key}": row[key] for key in ("tokens_per_second", "sent_per_token") if key in row}
    return curves | {"perf/memory": seen.memory, "perf/flops": seen.flops}


class Board:
    """Writes scalars under `folder`; `complain` is told once if writing fails.

    purge_step: the step from which on what was written there before does not count any more.
    """

    def __init__(
        self, folder: Path, complain: Callable[[str], None], enabled: bool = True, purge_step: int = 0
    ) -> None:
        self._complain = complain
        self._writer: Any = None
        if enabled:
            self._guard(lambda: self._open(folder, purge_step))

    def _open(self, folder: Path, purge_step: int) -> None:
        from lmtrain.event_file import EventFile  # TensorBoard takes a while to import, and not every run wants it

        self._writer = EventFile(folder, purge_step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write each value under its tag."""
        if self._writer is not None:
            self._guard(lambda: self._writer.scalars(values, step))

    def close(self) -> None:
        """No more is to come."""
        if self._writer is not None:
            self._guard(self._writer.close)

    def _guard(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            self._writer = None
            self._complain(f"TensorBoard stopped ({type(error).__name__}: {error}); the run goes on without it")
