"""What a run's folder may hold in place of what we wrote: it is told or passed over, whatever it is."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from lmtrain import checkpoint
from lmtrain.checkpoint.manifest import FileEntry, Manifest, _checksum, _text, read_manifest
from lmtrain.evaluation.compare import compare, read_row
from lmtrain.resume import check_state
from lmtrain.run import read_metrics, read_status
from lmtrain.run.lock import Holder
from lmtrain.run.rows import RowFile
from lmtrain.spikes import Spikes
from tests.mutations import VALUES, fuzz, mutated, refusal

MANIFEST = {
    "format": 1,
    "step": 5,
    "files": {name: {"bytes": 3, "sha256": "0" * 64} for name in ("state.json", "model.safetensors")},
    "config": "c" * 64,
    "dataset": None,
    "world": 1,
    "versions": {"lmtrain": "0.1.0", "torch": "2.13"},
}


@pytest.mark.fault(4, 16)
@fuzz(mutated(MANIFEST), 300, 20_000)
def test_any_manifest_with_a_right_checksum(content: Any, folder: Path) -> None:
    if isinstance(content, dict):
        content["checksum"] = _checksum(content)
    (folder / "manifest.json").write_bytes(_text(content))
    said = refusal(lambda: assert_well_formed(read_manifest(folder)))
    assert said is None or said.startswith("manifest.json: ")
    assert checkpoint.verify(folder), "no file is there"


def assert_well_formed(manifest: Manifest) -> None:
    assert type(manifest.step) is type(manifest.world) is int
    assert min(manifest.step, manifest.world - 1) >= 0
    for name, entry in manifest.files.items():
        assert "/" not in name
        assert not name.startswith(".")
        assert (type(entry.bytes), type(entry.sha256)) == (int, str)
    for text in (manifest.config, manifest.dataset):
        assert text is None or type(text) is str
    assert all(type(text) is str for pair in manifest.versions.items() for text in pair)


ROW = {
    "corpus": "text", "split": "validation", "fingerprint": "f" * 64, "text_sha256": "t" * 64, "documents": "reset",
    "tokenizer": "bytes", "whole_split": True, "bits_per_byte": 2.0, "context": 32, "stride": 32, "checkpoint": "a",
    "by_document": [{"nats": 20.0 + d, "tokens": 10, "bytes": 10 + d} for d in range(32)], "by_block": [],
}  # fmt: skip


@pytest.mark.fault(16)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@fuzz(mutated(ROW), 200, 10_000)
def test_any_kept_result(row: Any, folder: Path) -> None:
    path = folder / "row.json"
    path.write_text(json.dumps(row))
    if refusal(lambda: compare(read_row(path), ROW)) is None:
        compared = compare(read_row(path), ROW)
        json.dumps(compared.to_json(), allow_nan=False)
        compared.format()


LOCK = {"host": socket.gethostname(), "pid": 1, "started": "x"}
STATUS = {"state": "running", "step": 3, "checkpoint": "checkpoints/step-3", "reason": "", "time": "2020"}


@pytest.mark.fault(13)
@fuzz(st.one_of(mutated(LOCK), mutated(STATUS)), 300, 20_000)
def test_any_lock_and_status(content: Any, folder: Path) -> None:
    for name in ("lock", "status.json"):
        (folder / name).write_text(json.dumps(content))
    holder, status = Holder.read(folder / "lock"), read_status(folder)
    if holder is not None:
        holder.alive()
        str(holder)
    if status is not None:
        assert type(status.step) is int
        assert status.checkpoint is None or type(status.checkpoint) is str


@pytest.mark.fault(13)
@fuzz(st.lists(st.one_of(st.binary(max_size=30), VALUES.map(lambda value: json.dumps(value).encode()))), 200, 10_000)
def test_any_lines_in_place_of_rows(lines: list[bytes], folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    before = read_metrics(folder)
    rows = RowFile(path)
    rows.append({"step": 1})
    rows.close()
    assert read_metrics(folder) == [*before, {"step": 1}]


STATE = {
    "step": 5, "samples": 20, "tokens": 640, "skipped": 0, "skips_in_a_row": 0, "seq_len": 32, "fingerprint": "f" * 64,
    "tokenizer": {"name": "bytes"}, "parent": None, "rollbacks": 1, "unread": [[3, 5]],
    "spikes": {"loss": [1.0, 2.5], "grad_norm": [0.5]},
}  # fmt: skip


@pytest.mark.fault(4, 16)
@fuzz(mutated(STATE), 300, 20_000)
def test_any_state_with_a_right_hash(state: Any, folder: Path) -> None:
    manifest = Manifest(5, {"state.json": FileEntry(1, "0")})
    loaded = checkpoint.Checkpoint(folder, 5, {}, state, manifest)
    said = refusal(lambda: check_state(loaded))
    if said is None:
        counts = [state[key] for key, value in STATE.items() if type(value) is int and key != "rollbacks"]
        assert {type(count) for count in counts} == {int}
        assert min(counts) >= 0
        assert {type(state["fingerprint"]), type(state["parent"])} <= {str, type(None)}
        assert state["step"] == 5
        Spikes().load(state.get("spikes", Spikes().state()))
        assert all(first <= last for first, last in state.get("unread", ()))
    else:
        assert str(folder) in said
