"""The batches of steps that went wrong, kept in the run's folder for people to look at.

    offending/step-12-sample-44-rank-0.json         what was wrong, and for each row its sample's number and its text
    offending/step-12-sample-44-rank-0.safetensors  tokens, labels, and if there are some positions and document_ends,
                                                    int32 [rows, T]: see `data.loader.Batch`

The sample is the first one of the step, on all ranks. Each rank writes and removes files of its own; of ranks that
share rows the first one has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from data.loader import Batch
from data.tokenizer import Tokenizer
from lmtrain.files import replace_bytes
from lmtrain.run.rows import finite
from parallel.world import World

FOLDER = "offending"
KEPT = 10
"""Steps of which each rank keeps its batches: the last ones."""
_TENSORS = ("tokens", "labels", "positions", "document_ends")


class Offending:
    """Keeps batches of a run at `run`; `complain` is told once if the disk refuses."""

    def __init__(self, run: Path, tokenizer: Tokenizer, world: World, complain: Callable[[str], None]) -> None:
        self.run, self.tokenizer, self.world = run, tokenizer, world
        self._complain = complain
        self._complained = False

    def keep(self, batches: list[Batch], told: dict[str, Any], first_sample: int) -> str | None:
        """Write this rank's batches of the step `told["step"]`, and `told` with them, as JSON; all ranks call this.

        Returns what the first rank wrote, relative to the run; None, on all, if that failed.
        """
        name = f"step-{told['step']}-sample-{first_sample}-rank-"
        failed = None
        if self.world.sequence_rank == 0:
            try:
                self._write(f"{name}{self.world.rank}", batches, told)
            except Exception as error:  # whatever it is, no run ends for it
                failed = f"{type(error).__name__}: {error}"
        reasons = self.world.gather(failed)
        for rank, reason in enumerate(reasons):
            if reason and not self._complained:
                self._complain(f"the batch of step {told['step']} was not kept (rank {rank}: {reason}); told only once")
                self._complained = True
        return None if reasons[0] else f"{FOLDER}/{name}0.json"

    def _write(self, name: str, batches: list[Batch], told: dict[str, Any]) -> None:
        folder = self.run / FOLDER
        folder.mkdir(exist_ok=True)
        rows = [
            {"sample": sample, "text": self.tokenizer.decode(tokens.numpy()).decode(errors="replace")}
            for batch in batches
            for sample, tokens in zip(batch.samples, batch.tokens, strict=True)
        ]
        content = finite({**told, "rank": self.world.rank, "ranks": self.world.size, "rows": rows})
        # The JSON last, and removed first: where it is, the tensors are.
        replace_bytes(folder / f"{name}.safetensors", save(_joined(batches)))
        replace_bytes(folder / f"{name}.json", json.dumps(content, ensure_ascii=False, indent=1).encode())
        self._remove_old(folder, name)

    def _remove_old(self, folder: Path, newest: str) -> None:
        """Leave KEPT of this rank's, `newest` among them, and nothing that a killed process has not finished."""
        own = re.compile(rf"(step-\d+-sample-\d+-rank-{self.world.rank})\.(json|safetensors)(\.tmp-[0-9a-f]{{8}})?")
        found = {path: match for path in folder.iterdir() if (match := own.fullmatch(path.name))}
        ages = {match[1]: path.stat().st_mtime_ns for path, match in found.items() if not match[3]}
        ages.pop(newest)
        kept = {newest, *sorted(ages, key=ages.__getitem__, reverse=True)[: KEPT - 1]}
        for path, match in sorted(found.items()):
            if match[1] not in kept or match[3]:
                path.unlink()


def _joined(batches: list[Batch]) -> dict[str, Tensor]:
    """The rows of all micro-batches."""
    columns = {name: [getattr(batch, name) for batch in batches] for name in _TENSORS}
    return {name: torch.cat(parts).int() for name, parts in columns.items() if parts[0] is not None}


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What stands in a JSON that was kept, and the tensors beside it."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")), load_file(path.with_suffix(".safetensors"))
