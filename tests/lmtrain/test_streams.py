"""Rows of a batch as continuous streams: what is carried, that it resumes bit for bit, and what cannot be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attention.mixer import MIXERS
from lmtrain import checkpoint
from lmtrain.config import ConfigError, ModelConfig
from lmtrain.evaluation.evaluate import evaluate_carried
from lmtrain.loss import token_losses
from lmtrain.model import DecoderLM
from lmtrain.run import read_metrics
from lmtrain.streams import Streams
from lmtrain.train import DONE, Training, train
from tests.conformance.oracle import load
from tests.lmtrain import tiny
from tests.processes import SECONDS

STREAM = ["data.stream=true", "data.carry=48", "model.dropout=0"]


def losses_of_training(training: Any, steps: int) -> dict[int, list[torch.Tensor]]:
    """For each row its losses, segment after segment, with the states carried as in training; nothing is learnt."""
    found: dict[int, list[torch.Tensor]] = {}
    streams = Streams(training.model, training.config.micro_batch(), training.config.carry)
    for step in range(steps):
        for micro, batch in enumerate(training.loader.step(step * training.config.batch_sequences)):
            state = streams.at(micro, batch.begins)
            hidden = training.model.hidden(batch.tokens, state=state).y.detach()
            losses = token_losses(hidden.flatten(0, 1), training.model.head_weight, batch.labels.flatten())
            for row, values in enumerate(losses.view(batch.labels.shape)):
                found.setdefault(batch.first_sample % training.config.batch_sequences + row, []).append(values)
    return found


def test_a_row_is_scored_as_its_lane_in_one_stream(tmp_path: Path) -> None:
    from lmtrain.run import RunDirectory
    from lmtrain.signals import StopRequest

    config = tiny.config(tmp_path, *STREAM)
    with StopRequest() as stop, RunDirectory.open(tmp_path / "run") as run:
        training = Training(config, run, stop)
    text = training.data.train
    lane = len(text.tokens) // 4
    steps = 5
    found = losses_of_training(training, steps)
    assert sorted(found) == [0, 1, 2, 3]
    for row, losses in found.items():
        tokens = np.array(text.tokens[row * lane : row * lane + 32 * steps + 1])
        alone = replace(text, tokens=tokens, document_starts=np.array([0, len(tokens)]))
        expected = evaluate_carried(training.model, alone, seq_len=32, carry=48)
        assert float(torch.cat(losses).double().sum()) == pytest.approx(expected.nats, rel=1e-6)
    forgetful = losses_of_training_without_memory(training)
    assert not torch.allclose(forgetful, found[0][1], atol=1e-3), "the second segment is to know the first"


def losses_of_training_without_memory(training: Any) -> torch.Tensor:
    batch = training.loader.step(training.config.batch_sequences)[0]
    hidden = training.model.hidden(batch.tokens[:1]).y.detach()
    return token_losses(hidden.flatten(0, 1), training.model.head_weight, batch.labels[:1].flatten())


@pytest.mark.fault(5)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    runs = []
    for name, fault in (("whole", ""), ("killed", "step=7:kill")):
        folder = tmp_path / name
        folder.mkdir()
        words = [*STREAM, "data.documents=reset", "eval.every=0"]
        if fault:
            tiny.command(folder, *words, fault=fault).communicate(timeout=SECONDS)
        assert train(tiny.config(folder, *words)) == DONE
        rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(folder / "run")]
        runs.append((rows, checkpoint.load(folder / "run/checkpoints/step-12")))
    (rows, whole), (other_rows, resumed) = runs
    assert rows == other_rows
    assert whole.state["streams"] == resumed.state["streams"]
    assert whole.tensors["streams"].keys() == resumed.tensors["streams"].keys() != set()
    for group, members in whole.tensors.items():
        for name, tensor in members.items():
            assert torch.equal(tensor, resumed.tensors[group][name]), f"{group} {name}"


def test_evaluation_in_training_carries_too(tmp_path: Path) -> None:
    assert train(tiny.config(tmp_path, *STREAM)) == DONE
    rows = [row for row in read_metrics(tmp_path / "run") if "split" in row]
    assert {row["scoring"] for row in rows} == {"carried"}
    other = tmp_path / "windows"
    other.mkdir()
    assert train(tiny.config(other, *STREAM, "eval.context=32", "train.steps=4")) == DONE
    assert {row["scoring"] for row in read_metrics(other / "run") if "split" in row} == {"one-pass"}


def test_streams_begin_again_when_their_lanes_are_read(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, *STREAM)
    from lmtrain.setup import build_data, make_loader

    loader = make_loader(config, build_data(config).train)
    begins = [loader.step(step * 4)[0].begins for step in range(2 * loader.order.segments + 1)]  # type: ignore[union-attr]
    assert [step for step, begun in enumerate(begins) if begun] == [0, len(begins) // 2, len(begins) - 1]


@pytest.mark.fault(9)
def test_a_skipped_step_forgets_what_may_not_be_finite(tmp_path: Path) -> None:
    whole = tiny.command(tmp_path, *STREAM, "checkpoint.every=5", "train.steps=5", fault="step=5:grad=nan")
    text, _ = whole.communicate(timeout=SECONDS)
    assert whole.returncode == DONE, text
    kept = checkpoint.load(tmp_path / "run/checkpoints/step-5")
    assert kept.tensors["streams"] == {}
    assert kept.state["streams"] == {"dict": {}}


def test_a_fork_with_another_batch_is_refused_in_words(tmp_path: Path) -> None:
    assert train(tiny.config(tmp_path, *STREAM, "train.steps=4")) == DONE
    fork = tmp_path / "run/checkpoints/step-4"
    for change, words in (
        ("train.batch_tokens=64", "has 4 streams; train.batch_tokens / data.seq_len makes 2 of them"),
        ("train.micro_batch=4", "in micro-batches of 2, here they have 4: set train.micro_batch=2"),
    ):
        config = tiny.config(tmp_path, *STREAM, change, f"run.dir={tmp_path}/{change}")
        with pytest.raises(ValueError, match=words):
            train(config, resume=fork)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.learned_positions=64"], "data.stream=true: a stream runs out of the table of model.learned_positions"),
        (
            ["train.activation_checkpointing=true"],
            "data.stream=true: carries states, which train.activation_checkpointing",
        ),
        (["train.compile=true"], "data.stream=true: carries states, which train.compile"),
        (
            ["model.mixers.far={kind: mosa, selection: paper}"],
            "data.stream=true: carries nothing from a segment of which model.mixers.far sees",
        ),
        (["data.carry=0"], "data.carry=0: must be >= 1"),
        (["data.seq_len=1024", "train.batch_tokens=8192"], "data.stream=true: the 8 rows of a step read a lane of"),
    ],
)
def test_what_cannot_be_carried_is_told_before_training(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        tiny.config(tmp_path, "data.stream=true", *overrides)


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_every_mixer_goes_on_from_what_a_checkpoint_kept(kind: str) -> None:
    """In a whole model, whose layers may share a state; the JSON as text, as a file would hold it."""
    case = next(iter(load(kind).cases().values()))
    torch.manual_seed(0)
    mixers = {"it": {"kind": kind, **case.settings}, "near": {"kind": "local", "heads": 2, "window": 4}}
    config = ModelConfig(dim=case.dim, layers=2, ffn_dim=16, vocab_size=11, mixers=mixers, pattern="it+near")
    model = DecoderLM(config).double().eval()
    text = torch.randint(11, (2, 90))
    streams, resumed = Streams(model, 2, carry=40), Streams(model, 2, carry=40)
    with torch.no_grad():
        for part in text[:, :50].split([7, 33, 1, 9], 1):
            model(part, state=streams.at(0, False))
        kept, tensors = streams.snapshot()
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        resumed.load(json.loads(json.dumps(kept)), tensors)
        for part in text[:, 50:].split([1, 20, 19], 1):
            expected = model(part, state=streams.at(0, False))
            assert torch.equal(model(part, state=resumed.at(0, False)), expected)
    assert resumed.bytes == streams.bytes > 0


def test_kept_states_of_another_model_are_refused() -> None:
    def streams(**local: Any) -> Streams:
        mixers = {"it": {"kind": "local", "heads": 2, **local}}
        config = ModelConfig(dim=8, layers=2, ffn_dim=16, vocab_size=11, mixers=mixers, pattern="it")
        model = DecoderLM(config)
        made = Streams(model, 2, carry=40)
        with torch.no_grad():
            model(torch.randint(11, (2, 6)), state=made.at(0, False))
        return made

    kept, tensors = streams().snapshot()
    with pytest.raises(ValueError, match="another mixer or batch"):
        Streams(streams().model, 3, carry=40).load(kept, tensors)
    for forged in ({"dict": {"0": {"object": {"harm": 1}}}}, {"dict": {"0": {"tensor": "none"}}}, {"dict": {"x": 1}}):
        with pytest.raises(ValueError, match=r"not fit|another mixer|invalid literal"):
            streams().load(forged, tensors)
