"""Training on several ranks: the same run as in one process, whichever world wrote the checkpoint it goes on from."""

import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from data.dataset import TokenDataset
from lmtrain import checkpoint
from lmtrain.config import load
from lmtrain.evaluation.evaluate import evaluate
from lmtrain.run import RunDirectory, read_metrics, read_status
from lmtrain.setup import build_data, build_model
from lmtrain.train import DONE, STOPPED, train
from parallel.world import ALONE, World
from tests.lmtrain import tiny
from tests.processes import run_ranks

PLAIN = ["train.micro_batch=1", "model.dropout=0.2"]
CODES = ["model.mixers.far={kind: vq, heads: 2, block: 8, codes: 4}", "train.micro_batch=1"]
STREAM = ["data.stream=true", "data.carry=48", "data.documents=reset", "train.micro_batch=1"]


def work(world: World, folder: Path, name: str, overrides: list[str], fault: str = "", resume: Any = None) -> Any:
    """The exit code of a run, or what the user is told."""
    settings = [*tiny.settings(folder), f"run.dir={folder}/{name}", *overrides]
    with patch.dict(os.environ, LMTRAIN_FAULT=fault):
        try:
            return train(load(folder / "tiny.yaml", settings, ranks=world.size), resume=resume, world=world)
        except ValueError as error:
            return str(error)


def run(ranks: int, folder: Path, name: str, *words: str, fault: str = "", resume: Path | None = None) -> list[Any]:
    tiny.write(folder)
    if ranks == 1:
        return [work(ALONE, folder, name, list(words), fault, resume)]
    return run_ranks(ranks, work, folder, name, list(words), fault, resume)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(run)]


def assert_alike(one: Path, other: Path, first: int = 0, exact: bool = False, muon: bool = False) -> None:
    """The rows beyond step `first`, and the tensors of the last checkpoint: bit by bit, or to rounding.

    `torch.optim.Muon` makes its updates orthogonal in bfloat16: there a difference of 1e-7 may round to one of 1e-3.
    """
    tolerance = 0.0 if exact else 3e-5 if muon else 1e-6
    rows, expected = ([row for row in rows_of(run) if row["step"] > first] for run in (one, other))
    assert [(row["step"], row.get("batch"), row.get("split")) for row in rows] == [
        (row["step"], row.get("batch"), row.get("split")) for row in expected
    ]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=tolerance)
    loaded, wanted = (checkpoint.load(run / "checkpoints/step-12") for run in (one, other))
    assert loaded.tensors.keys() == wanted.tensors.keys()
    for group, members in wanted.tensors.items():
        assert members.keys() == loaded.tensors[group].keys()
        for key, tensor in members.items():
            found = loaded.tensors[group][key]
            torch.testing.assert_close(found, tensor, msg=f"{group} {key}", atol=20 * tolerance, rtol=0.0)
    assert {**loaded.state, "parent": None, "spikes": None} == {**wanted.state, "parent": None, "spikes": None}
    for key, numbers in wanted.state["spikes"].items():
        assert loaded.state["spikes"][key] == pytest.approx(numbers, rel=1e-5 if tolerance else 0, abs=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the runs of one process and of two ranks: `plain-1`, `plain-2`."""
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        assert run(ranks, folder, f"plain-{ranks}", *PLAIN) == [DONE] * ranks
    return folder


def test_two_ranks_are_one_process(folder: Path) -> None:
    assert_alike(folder / "plain-2", folder / "plain-1")
    one, two = (
        {path.relative_to(folder / name) for path in (folder / name).rglob("*")} for name in ("plain-1", "plain-2")
    )
    assert one == two
    log = (folder / "plain-2/log.txt").read_text().splitlines()
    assert len(log) == len((folder / "plain-1/log.txt").read_text().splitlines())
    worlds = [checkpoint.load(folder / f"plain-{ranks}/checkpoints/step-12").manifest.world for ranks in (1, 2)]
    assert worlds == [1, 2]


@pytest.mark.fault(6)
@pytest.mark.parametrize(("wrote", "reads"), [(1, 2), (2, 1), (2, 2)])
def test_a_checkpoint_fits_any_number_of_ranks(folder: Path, wrote: int, reads: int) -> None:
    name = f"from-{wrote}-on-{reads}"
    parent = folder / f"plain-{wrote}/checkpoints/step-4"
    assert run(reads, folder, name, *PLAIN, resume=parent) == [DONE] * reads
    assert_alike(folder / name, folder / f"plain-{wrote}", first=4, exact=wrote == reads)


@pytest.mark.fault(6)
@pytest.mark.slow
@pytest.mark.parametrize("words", [PLAIN, CODES, STREAM, [*PLAIN, "optimizer.kind=muon"]])
def test_one_two_and_four_ranks(tmp_path: Path, words: list[str]) -> None:
    for ranks in (1, 2, 4):
        assert run(ranks, tmp_path, str(ranks), *words) == [DONE] * ranks
    muon = "optimizer.kind=muon" in words
    for ranks in (2, 4):
        assert_alike(tmp_path / str(ranks), tmp_path / "1", muon=muon)
    for wrote, reads in ((4, 1), (1, 4), (4, 2)):
        name = f"from-{wrote}-on-{reads}"
        parent = tmp_path / f"{wrote}/checkpoints/step-8"
        assert run(reads, tmp_path, name, *words, resume=parent) == [DONE] * reads
        assert_alike(tmp_path / name, tmp_path / "1", first=8, muon=muon)


@pytest.mark.fault(6)
def test_streams_are_kept_for_all_ranks_and_dealt_out_again(tmp_path: Path) -> None:
    assert run(2, tmp_path, "two", *STREAM) == [DONE] * 2
    state = checkpoint.load(tmp_path / "two/checkpoints/step-4").state
    assert sorted(state["streams"]["dict"]) == ["0", "1", "2", "3"]
    for ranks in (2, 1):
        name, parent = f"fork-{ranks}", tmp_path / "two/checkpoints/step-4"
        assert run(ranks, tmp_path, name, *STREAM, resume=parent) == [DONE] * ranks
        assert_alike(tmp_path / name, tmp_path / "two", first=4, exact=ranks == 2)
    other = ["data.stream=true", "data.carry=48", "data.documents=reset", "train.micro_batch=2"]
    (told,) = run(1, tmp_path, "wider", *other, resume=tmp_path / "two/checkpoints/step-4")
    assert "train.micro_batch" in told


@pytest.mark.fault(7)
def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(folder: Path) -> None:
    assert run(2, folder, "stopped", *PLAIN, fault="step=6:term:rank=1") == [STOPPED] * 2
    status = read_status(folder / "stopped")
    assert status is not None
    assert (status.state, status.step, status.checkpoint) == ("stopped", 6, "checkpoints/step-6")
    assert status.reason == "SIGTERM"
    assert run(2, folder, "stopped", *PLAIN) == [DONE] * 2
    assert_alike(folder / "stopped", folder / "plain-2", exact=True)


@pytest.mark.fault(9)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(folder: Path) -> None:
    words = ["checkpoint.every=1", "checkpoint.keep=20", "train.steps=7"]
    assert run(2, folder, "skipped", *PLAIN, *words, fault="step=6:grad=nan:rank=1") == [DONE] * 2
    before, after = (checkpoint.load(folder / f"skipped/checkpoints/step-{step}") for step in (5, 6))
    for group, members in before.tensors.items():
        assert all(torch.equal(tensor, after.tensors[group][name]) for name, tensor in members.items())
    rows = {row["step"]: row for row in rows_of(folder / "skipped") if "split" not in row}
    assert (rows[5]["skipped"], rows[6]["skipped"], rows[7]["skipped"]) == (0, 1, 1)


@pytest.mark.fault(13)
def test_what_the_first_rank_refuses_ends_for_all(folder: Path) -> None:
    with RunDirectory.open(folder / "plain-1"):
        assert [("in use by" in told) for told in run(2, folder, "plain-1", *PLAIN)] == [True] * 2
    (folder / "damaged").mkdir()
    told = run(2, folder, "new", *PLAIN, resume=folder / "damaged")
    assert ["damaged" in each for each in told] == [True] * 2
    assert (folder / "new/log.txt").read_text().count("failed: ") == 1
    words = ["train.micro_batch=3", "train.batch_tokens=96"]
    assert ["ranks 2; nearest: " in each for each in run(2, folder, "uneven", *words)] == [True] * 2


def starved(world: World, folder: Path) -> Any:
    """As `work`, but the first rank may write no file larger than 8 kB: no checkpoint, but all rows."""
    if world.is_first:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
    return work(world, folder, "starved", PLAIN)


@pytest.mark.fault(12)
def test_a_last_checkpoint_that_the_disk_refuses_fails_on_all(folder: Path) -> None:
    assert run_ranks(2, starved, folder) == [1, 1]
    status = read_status(folder / "starved")
    assert status is not None
    assert (status.state, status.reason) == ("failed", "the last checkpoint could not be written")


def scored(world: World, folder: Path, selection: str) -> Any:
    """(nats, tokens, bytes, gap) of an evaluation, and how often this rank ran the model."""
    far = f"model.mixers.far={{kind: mosa, heads: 4, keep: 8, selection: {selection}}}"
    config = load(folder / "tiny.yaml", [*tiny.settings(folder), far])
    model = build_model(config, torch.device("cpu"))
    passes: list[int] = []
    real = model.hidden
    model.hidden = lambda *words, **names: (passes.append(1), real(*words, **names))[1]  # type: ignore[method-assign]
    text: TokenDataset = build_data(config).validation[0]
    prefixes = 20 if selection == "paper" else None
    found = evaluate(model, text, context=32, stride=16, batch_tokens=64, prefixes=prefixes, world=world)
    gap = None if found.leak is None else found.leak.gap
    parts = [*found.by_document, *found.by_block]
    return [found.nats, found.scored_tokens, found.bytes, gap, found.by_position, parts], len(passes)


@pytest.mark.parametrize("selection", ["strict", "paper"])
def test_evaluation_is_shared_and_its_number_that_of_one_process(folder: Path, selection: str) -> None:
    expected, alone = scored(ALONE, folder, selection)
    (one, passes), (other, others) = run_ranks(2, scored, folder, selection)
    assert one == other
    assert one[1:3] == expected[1:3]
    assert one[0] == pytest.approx(expected[0], rel=1e-9)
    assert len(one[-1]) == len(expected[-1]) == (2 if selection == "strict" else 0)
    for part, alone_part in zip(one[-1], expected[-1], strict=True):
        assert replace(part, nats=0) == replace(alone_part, nats=0)
        assert part.nats == pytest.approx(alone_part.nats, rel=1e-9)
    assert passes == others
    assert alone / 2 <= passes <= alone / 2 + 2
