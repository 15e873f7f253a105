"""A trained model as files that other programs read: the weights, and what is needed to make sense of them.

model.safetensors   parameters and buffers by name, float32, as `DecoderLM(config.model).load_state_dict` takes them
config.yaml         the run's configuration
tokenizer.json      text <-> token ids
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from data.disk import sync_folder
from lmtrain import config as configuration
from lmtrain.checkpoint.tensorfile import write_tensors
from lmtrain.files import HashingWriter, token
from lmtrain.restore import open_run


def export(path: Path, out: Path | None = None) -> Path:
    """Write the model of a run (of its newest intact checkpoint) or of one of its checkpoints to the new folder `out`.

    Default: `export/step-N` of the run. The folder is complete or absent. Returns it; ValueError if there is nothing to
    export, or something in its place.
    """
    restored = open_run(path)
    out = restored.run / "export" / f"step-{restored.step}" if out is None else out.expanduser()
    if out.exists():
        raise ValueError(f"{out} is there already; --out names another folder")
    temporary = out.with_name(f"{out.name}.tmp-{token()}")
    temporary.mkdir(parents=True)
    try:
        with HashingWriter(temporary / "model.safetensors") as writer:
            write_tensors(writer, restored.model.state_dict())
        configuration.save(restored.config, temporary / "config.yaml")
        (temporary / "tokenizer.json").write_text(json.dumps(restored.tokenizer.to_json(), indent=1) + "\n")
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(out.parent)
    return out
