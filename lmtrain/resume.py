"""Where a run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lmtrain import checkpoint
from lmtrain.config import Config
from lmtrain.counters import is_count, misfits
from lmtrain.run import RunFolder
from lmtrain.spikes import Spikes


def choose(
    run: RunFolder, resume: Path | None, fresh: bool, complain: Callable[[str], None]
) -> tuple[str | None, bool]:
    """The checkpoint to go on from, None for the beginning; and whether it is one of this run.

    resume: the one that was asked for; else it is the newest of the run that verifies, and each newer one is named
    aloud. fresh: whether to begin again if all are damaged. ValueError if the one asked for will not do, or none is
    left.
    """
    newest, rejected = checkpoint.newest(run.checkpoints)
    _tell(run, rejected, complain)
    if resume is not None:
        return _asked(run, resume.expanduser(), newest)
    if newest is None and rejected and not fresh:
        raise ValueError(f"no checkpoint of {run.path} can be used; to begin again from step 0 beside them: --fresh")
    return None if newest is None else str(newest), True


def choose_before(run: RunFolder, step: int, complain: Callable[[str], None]) -> str | None:
    """The newest checkpoint of the run that verifies, of those up to `step`, to roll back to; None if there is none.

    Those beyond it are set aside.
    """
    chosen, rejected = checkpoint.newest(run.checkpoints, last=step)
    _tell(run, rejected, complain)
    if chosen is None:
        return None
    checkpoint.undo(chosen)
    return str(chosen)


def _tell(run: RunFolder, rejected: list[tuple[Path, str]], complain: Callable[[str], None]) -> None:
    for path, reason in rejected:
        run.event("damaged", path=path.name, reason=reason)
        complain(f"checkpoint {path.name} is damaged and is not used: {reason}")


def _asked(run: RunFolder, resume: Path, newest: Path | None) -> tuple[str, bool]:
    if problems := checkpoint.verify(resume):
        raise ValueError(f"checkpoint {resume}: {'; '.join(problems)}")
    own = resume.resolve().parent == run.checkpoints.resolve()
    if newest is not None and not (own and resume.resolve() == newest.resolve()):
        raise ValueError(
            f"--resume {resume}: {run.path} already has {newest.name}; to start another run from a checkpoint choose a "
            "new run.dir"
        )
    return str(resume), own


def check_state(loaded: checkpoint.Checkpoint) -> None:
    """ValueError if the state of the checkpoint is not that of a training run."""
    state = loaded.state if isinstance(loaded.state, dict) else {}
    counts = ("seq_len", "rows", "micro_batch") if "streams" in state else ("seq_len",)
    wrong = misfits(state) + [key for key in counts if not is_count(state.get(key))]
    if "spikes" in state and not Spikes.is_state(state["spikes"]):  # earlier versions had none
        wrong.append("spikes")
    wrong += [key for key in ("fingerprint", "parent") if not isinstance(state.get(key, ...), str | None)]
    if wrong:
        raise ValueError(f"checkpoint {loaded.path}: its state lacks {', '.join(wrong)}, or has something else there")
    if state["step"] != loaded.step:
        raise ValueError(f"checkpoint {loaded.path}: its state is of step {state['step']}, not {loaded.step}")


def refuse_others(loaded: checkpoint.Checkpoint, config: Config, fingerprint: str, ranks: int) -> None:
    """ValueError if the checkpoint is of other data than `fingerprint` says, or has streams that are cut otherwise."""
    state = loaded.state
    expected = {"data": fingerprint, "data.seq_len": config.data.seq_len}
    found = {"data": state["fingerprint"], "data.seq_len": state["seq_len"]}
    changed = [f"{key} was {found[key]}, now {expected[key]}" for key in expected if found[key] != expected[key]]
    if changed:
        raise ValueError(f"checkpoint {loaded.path} belongs to other data: {'; '.join(changed)}")
    if not (config.data.stream and "streams" in state):
        return
    if (rows := state["rows"]) != config.batch_sequences:
        raise ValueError(
            f"checkpoint {loaded.path} has {rows} streams; train.batch_tokens / data.seq_len makes "
            f"{config.batch_sequences} of them"
        )
    if (micro := state["micro_batch"]) != config.micro_batch(ranks):
        raise ValueError(
            f"checkpoint {loaded.path} has its streams in micro-batches of {micro}, here they have "
            f"{config.micro_batch(ranks)}: set train.micro_batch={micro}"
        )
