"""The batch of a step that went wrong is kept, whole and by itself, by each rank; and no run ends for it."""

import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import Batch
from data.tokenizer import ByteTokenizer
from lmtrain import offending
from lmtrain.offending import KEPT, Offending, read
from lmtrain.run import read_metrics
from lmtrain.setup import build_data, make_loader
from lmtrain.train import DONE, train
from parallel.world import ALONE, World
from tests.documents import code_blocks
from tests.lmtrain import tiny
from tests.lmtrain.test_ranks import run as run_ranked
from tests.lmtrain.test_ranks import work
from tests.lmtrain.test_spikes import BAD, LONG, SPIKE, events
from tests.processes import run_ranks

TOLD = {"step": 7, "loss": 3.5, "grad_norm": math.nan}


def batch(first: int, text: bytes, positions: bool = False) -> Batch:
    """Two rows of one text each."""
    tokens = torch.tensor([list(text), list(text[::-1])])
    extra = torch.arange(tokens.numel()).view_as(tokens) if positions else None
    return Batch(tokens, tokens + 1, extra, None if extra is None else extra + 9, (first, first + 5), True, 0)


def keeper(folder: Path, complaints: list[str] | None = None, world: World = ALONE) -> Offending:
    said: list[str] = [] if complaints is None else complaints
    return Offending(folder, ByteTokenizer(), world, said.append)


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "offending").iterdir()}


@pytest.mark.parametrize("positions", [False, True])
def test_what_is_written_can_be_read(tmp_path: Path, positions: bool) -> None:
    batches = [batch(44, b"the fox", positions), batch(46, "l\xe4ufts".encode(), positions)]
    name = keeper(tmp_path).keep(batches, TOLD, 40)
    assert name == "offending/step-7-sample-40-rank-0.json"
    told, tensors = read(tmp_path / name)
    assert (told["step"], told["loss"], told["grad_norm"]) == (7, 3.5, None)
    assert [row["sample"] for row in told["rows"]] == [44, 49, 46, 51]
    assert [row["text"] for row in told["rows"]][:3] == ["the fox", "xof eht", "l\xe4ufts"]
    assert tensors.keys() == {"tokens", "labels", *(("positions", "document_ends") if positions else ())}
    for key, tensor in tensors.items():
        assert torch.equal(tensor, torch.cat([getattr(each, key) for each in batches]).int()), key


def test_only_so_many_are_kept_the_last_ones(tmp_path: Path) -> None:
    keep = keeper(tmp_path)
    others = {"step-1-sample-0-rank-1.json", "notes.txt"}
    (tmp_path / "offending").mkdir()
    for name in others:
        (tmp_path / "offending" / name).write_text("")
    (tmp_path / "offending/step-1-sample-0-rank-0.json.tmp-0123abcd").write_text("")
    for number in range(KEPT + 3):
        keep.keep([batch(number, b"a")], {**TOLD, "step": 50 - number}, number)
        for path in (tmp_path / "offending").glob(f"*-sample-{number}-*"):
            os.utime(path, (1000 + number, 1000 + number))  # clocks are coarse
    last = {f"step-{50 - number}-sample-{number}-rank-0" for number in range(3, KEPT + 3)}
    assert names(tmp_path) == others | {f"{name}.{kind}" for name in last for kind in ("json", "safetensors")}


@pytest.mark.fault(12)
def test_a_disk_that_refuses_is_told_of_once_and_nothing_is_left(tmp_path: Path) -> None:
    complaints: list[str] = []
    keep = keeper(tmp_path, complaints)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert [keep.keep([batch(0, b"a" * 50)], {**TOLD, "step": step}, 0) for step in (7, 8)] == [None, None]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (complaint,) = complaints
    assert "the batch of step 7 was not kept" in complaint
    assert "File too large" in complaint
    assert names(tmp_path) == set()


def read_at(step: int, folder: Path, *words: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """What the tiny run reads at a step: tokens, labels, samples."""
    config = tiny.config(folder, *words)
    batches = make_loader(config, build_data(config).train).step(4 * (step - 1))
    return (
        torch.cat([each.tokens for each in batches]),
        torch.cat([each.labels for each in batches]),
        [sample for each in batches for sample in each.samples],
    )


@pytest.mark.fault(9)
def test_a_skipped_update_keeps_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMTRAIN_FAULT", "step=6:grad=nan")
    assert train(tiny.config(tmp_path)) == DONE
    run = tmp_path / "run"
    (event,) = events(run, "skip")
    assert f"gradient norm nan; its batch: {run}/{event['offending']}\n" in capsys.readouterr().err
    told, tensors = read(run / event["offending"])
    tokens, labels, samples = read_at(6, tmp_path)
    assert torch.equal(tensors["tokens"], tokens.int())
    assert torch.equal(tensors["labels"], labels.int())
    assert [row["sample"] for row in told["rows"]] == samples == [20, 21, 22, 23]
    assert [row["text"].encode() for row in told["rows"]] == [bytes(row) for row in tokens.tolist()]
    assert (told["step"], told["grad_norm"], told["rank"], told["ranks"]) == (6, None, 0, 1)
    assert names(run) == {f"step-6-sample-20-rank-0.{kind}" for kind in ("json", "safetensors")}


@pytest.mark.fault(10)
def test_a_spike_keeps_what_the_model_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_FAULT", SPIKE)
    assert train(tiny.config(tmp_path, *LONG, "data.documents=reset")) == DONE
    (event,) = events(tmp_path / "run", "spike")
    told, tensors = read(tmp_path / "run" / event["offending"])
    assert (told["step"], told["loss"], told["grad_norm"]) == (BAD, event["loss"], event["grad_norm"])
    assert tensors.keys() == {"tokens", "labels", "positions", "document_ends"}
    usual = read_at(BAD, tmp_path, *LONG, "data.documents=reset", f"run.dir={tmp_path}/other")[0]
    assert (tensors["tokens"] != usual).float().mean() > 0.5, "random tokens are injected"


@pytest.mark.fault(9)
@pytest.mark.parametrize("sequence", [1, 2])
def test_ranks_keep_the_rows_of_one_process(tmp_path: Path, sequence: int) -> None:
    """Of two that share rows the first one has them all."""
    words = ["train.micro_batch=2", "model.dropout=0"]
    assert run_ranked(1, tmp_path, "one", *words, fault="step=6:grad=nan") == [DONE]
    settings = [*words, f"parallel.sequence={sequence}"]
    spoilt = "step=6:grad=nan:rank=1"
    assert run_ranks(2, work, tmp_path, "two", settings, spoilt, sequence=sequence) == [DONE] * 2
    (path,) = (tmp_path / "one/offending").glob("*.json")
    alone, whole = read(path)
    paths = sorted((tmp_path / "two/offending").glob("*.json"))
    assert [path.name for path in paths] == [f"step-6-sample-20-rank-{rank}.json" for rank in range(3 - sequence)]
    rows: dict[int, Any] = {}
    for path in paths:
        told, tensors = read(path)
        assert told["ranks"] == 2
        rows |= {
            row["sample"]: (row["text"], tokens.tolist())
            for row, tokens in zip(told["rows"], tensors["tokens"], strict=True)
        }
    expected = zip(alone["rows"], whole["tokens"], strict=True)
    assert rows == {row["sample"]: (row["text"], tokens.tolist()) for row, tokens in expected}


@pytest.mark.fault(12)
def test_no_room_for_a_batch_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMTRAIN_FAULT", "step=6:grad=nan,step=8:grad=nan")
    assert train(tiny.config(tmp_path)) == DONE
    usual = [row["loss"] for row in read_metrics(tmp_path / "run")]
    capsys.readouterr()
    elsewhere = tmp_path / "elsewhere"
    real = Path.mkdir

    def mkdir(self: Path, *words: Any, **names: Any) -> None:
        if self.name == offending.FOLDER:
            raise OSError(28, os.strerror(28), str(self))
        real(self, *words, **names)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert train(tiny.config(tmp_path, f"run.dir={elsewhere}")) == DONE
    assert [row["loss"] for row in read_metrics(elsewhere)] == usual
    assert capsys.readouterr().err.count("was not kept") == 1
    assert [event["offending"] for event in events(elsewhere, "skip")] == [None, None]


def test_the_recipe_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/x").mkdir(parents=True)
    keeper(tmp_path / "runs/x").keep([batch(44, b"the fox")], {**TOLD, "step": 12}, 44)
    (recipe,) = [block for block in code_blocks("docs/watching.md", "python") if "offending" in block]
    monkeypatch.chdir(tmp_path)
    said: list[Any] = []
    exec(recipe, {"print": lambda *words: said.append(words)})
    assert said == [(12, 3.5, None), (44, "the fox", 7), (49, "xof eht", 7)]
