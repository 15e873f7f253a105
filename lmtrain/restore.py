"""From a run's folder back to its model: configuration, tokenizer, the newest checkpoint that verifies."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer, from_json
from lmtrain import checkpoint as checkpoints
from lmtrain.checkpoint import Checkpoint
from lmtrain.checkpoint.manifest import STEP_FOLDER
from lmtrain.checkpoint.shelf import candidates
from lmtrain.config import Config, load, reload
from lmtrain.hardware import pick_device
from lmtrain.model import DecoderLM
from lmtrain.run import environment
from lmtrain.setup import build_data, build_model, with_vocabulary
from parallel.engine import DTYPES, autocast


@dataclass(frozen=True)
class Restored:
    """A trained model, in evaluation mode on the device of this process, and where it comes from.

    config: with model.vocab_size filled in. run: its folder. checkpoint: the folder that was read, of `step`
    updates; checkpoint_sha256: of its manifest. fingerprint: of the tokens that the model was trained on.
    """

    config: Config
    model: DecoderLM
    tokenizer: Tokenizer
    run: Path
    checkpoint: Path
    step: int
    checkpoint_sha256: str
    fingerprint: str | None

    @property
    def source(self) -> dict[str, Any]:
        """Where a number of this model comes from, as JSON: the weights, and what it was computed on."""
        return {
            "checkpoint": str(self.checkpoint),
            "checkpoint_sha256": self.checkpoint_sha256,
            "step": self.step,
            "trained_length": self.config.data.seq_len,
            "environment": environment.describe(),
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the model was trained in."""
        return autocast(next(self.model.parameters()).device, DTYPES[self.config.train.dtype])


def open_run(path: str | Path, checkpoint: str | Path | None = None, overrides: Sequence[str] = ()) -> Restored:
    """The model of a run.

    path: the run's folder, or one of its checkpoints. checkpoint: one of the run by name (`step-250`), or
    any by its path. One that was asked for is used or nothing is; else it is the newest that verifies, and
    each newer one is named on stderr with what is wrong. overrides: of settings, as `key=value`. ValueError
    says what is missing, damaged or does not fit.
    """
    run, asked = _locate(Path(path).expanduser(), checkpoint)
    config = reload(run, overrides)
    loaded = checkpoints.load(asked or _newest(run), groups=["model"])
    tokenizer = _tokenizer(loaded)
    config = with_vocabulary(config, tokenizer)
    model = DecoderLM(config.model)
    try:
        model.load_state_dict(loaded.tensors["model"])
    except RuntimeError as error:
        raise ValueError(f"checkpoint {loaded.path} does not fit {run / 'config.yaml'}: {error}") from None
    return Restored(
        config,
        model.to(pick_device()).eval(),
        tokenizer,
        run,
        checkpoint=loaded.path,
        step=loaded.step,
        checkpoint_sha256=loaded.manifest.checksum,
        fingerprint=loaded.manifest.dataset,
    )


def model_to_audit(config_or_run: str | Path, overrides: Sequence[str] = ()) -> tuple[DecoderLM, Config]:
    """The model of a run's folder, or of a configuration and then with fresh weights; errors as above."""
    if Path(config_or_run).expanduser().is_dir():
        restored = open_run(config_or_run, overrides=overrides)
        return restored.model, restored.config
    config = load(config_or_run, overrides)
    if config.model.vocab_size is None:
        config = with_vocabulary(config, build_data(config).tokenizer)
    return build_model(config, pick_device()).eval(), config


def _locate(path: Path, checkpoint: str | Path | None) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint that was asked for)."""
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such folder; a run is opened by its folder, which training names in its last line"
        )
    absolute = path.resolve()
    if STEP_FOLDER.fullmatch(absolute.name) and absolute.parent.name == "checkpoints":
        if checkpoint is not None:
            raise ValueError(f"{path} is a checkpoint already; {checkpoint} would be another")
        return absolute.parent.parent, absolute
    if checkpoint is None:
        return path, None
    for folder in (path / "checkpoints" / checkpoint, Path(checkpoint).expanduser()):
        if folder.is_dir():
            return path, folder
    known = ", ".join(candidate.name for candidate in candidates(path / "checkpoints")) or "none"
    raise ValueError(f"{path} has no checkpoint {checkpoint}; it has {known}")


def _newest(run: Path) -> Path:
    folder = run / "checkpoints"
    newest, rejected = checkpoints.newest(folder)
    for path, problems in rejected:
        print(f"warning: {path} is damaged and not used: {problems}", file=sys.stderr)
    if newest is not None:
        return newest
    if rejected:
        raise ValueError(f"no checkpoint in {folder} verifies; the damaged ones are named above")
    raise ValueError(f"{run} has no checkpoint yet; training writes one every checkpoint.every steps and at its end")


def _tokenizer(loaded: Checkpoint) -> Tokenizer:
    if not isinstance(loaded.state, dict) or "tokenizer" not in loaded.state:
        raise ValueError(f"checkpoint {loaded.path}: its state has no tokenizer")
    try:
        return from_json(loaded.state["tokenizer"])
    except ValueError as error:
        raise ValueError(f"checkpoint {loaded.path}: its tokenizer cannot be used: {error}") from None
