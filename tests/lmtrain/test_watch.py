"""What a run says of its mixers, how it marks a loss that sees ahead, and where it stops a NaN in debug mode."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attention.mixer import Context
from launch.cli import main
from lmtrain import checkpoint, fault, watch
from lmtrain import train as training
from lmtrain.model import DecoderLM
from lmtrain.run import read_metrics, read_status
from lmtrain.train import DONE, GAVE_UP, train
from tests.lmtrain import tiny

CHOOSES = [
    "model.mixers={near: {kind: local, heads: 2, window: 8}, far: {kind: mosa, heads: 2, keep: 4}, "
    "by: {kind: routing, heads: 2, clusters: 3, window: 4}}",
    "model.pattern=near near+far+by",
]
PAPER = ["model.mixers.far={kind: mosa, heads: 2, keep: 4, selection: paper}", "train.steps=4", "eval.tokens=64"]
OF_MOSA = {"active_share", "busiest_head", "overflow", "gate", "router_entropy", "dead_heads"}


def steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if "split" not in row]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """The contexts of all training passes from now on."""
    contexts: list[Context] = []
    loss = DecoderLM.loss

    @functools.wraps(loss)
    def spied(model: DecoderLM, tokens: Any, labels: Any, ctx: Context, *state: Any) -> Any:
        contexts.append(ctx)
        return loss(model, tokens, labels, ctx, *state)

    monkeypatch.setattr(DecoderLM, "loss", spied)
    return contexts


def test_statistics_as_numbers() -> None:
    one, half = torch.tensor(1.0), torch.tensor(0.5, dtype=torch.float64)
    numbers = watch.read(
        {0: {"near": {}}, 1: {"near": {}, "far": {"gate": half, "load": one}}, 2: {"far": {"gate": one}}}
    )
    assert numbers == {"1": {"far": {"gate": 0.5, "load": 1.0}}, "2": {"far": {"gate": 1.0}}}
    assert watch.tags(numbers) == {"mixer/1/far/gate": 0.5, "mixer/1/far/load": 1.0, "mixer/2/far/gate": 1.0}
    assert watch.read({}) == watch.tags({}) == {}


def test_logged_steps_say_what_the_mixers_do(tmp_path: Path, asked: list[Context]) -> None:
    assert train(tiny.config(tmp_path, *CHOOSES, "log.every=5", "log.tensorboard=true")) == DONE
    rows = steps(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 5, 10, 12]
    for row in rows:
        assert row["mixers"].keys() == {"1"}  # the first layer, and `near`, have nothing to say
        assert row["mixers"]["1"].keys() == {"far", "by"}
        assert row["mixers"]["1"]["far"].keys() == OF_MOSA
        assert 4 / 32 <= row["mixers"]["1"]["far"]["active_share"] <= 1
    shown = scalars(tmp_path / "run")
    for name in OF_MOSA:
        numbers = [(row["step"], pytest.approx(row["mixers"]["1"]["far"][name], rel=1e-6)) for row in rows]
        assert shown[f"mixer/1/far/{name}"] == numbers
    # Two micro-batches a step; only the last one of a logged step is watched.
    watched = [number // 2 + 1 for number, ctx in enumerate(asked) if ctx.statistics is not None]
    assert (len(asked), watched) == (24, [1, 5, 10, 12])
    assert all(number % 2 for number, ctx in enumerate(asked) if ctx.statistics is not None)


def test_who_chooses_nothing_has_no_such_key(tmp_path: Path) -> None:
    assert train(tiny.config(tmp_path, "log.tensorboard=true")) == DONE
    assert all("mixers" not in row and row["causality"] == "strict" for row in read_metrics(tmp_path / "run"))
    shown = scalars(tmp_path / "run")
    assert "train/loss" in shown
    assert not [tag for tag in shown if tag.startswith("mixer/") or "ahead" in tag]


@pytest.mark.parametrize("how", [[], ["train.activation_checkpointing=true", "train.dtype=bfloat16"]], ids=["", "bf16"])
def test_watching_changes_no_bit(tmp_path: Path, how: list[str]) -> None:
    tensors = []
    for every in (1, 100):
        folder = tmp_path / str(every)
        folder.mkdir()
        assert train(tiny.config(folder, *CHOOSES, *how, f"log.every={every}")) == DONE
        tensors.append(checkpoint.load(folder / "run/checkpoints/step-12").tensors)
    for group, members in tensors[0].items():
        assert all(torch.equal(tensor, tensors[1][group][name]) for name, tensor in members.items())
    assert all(row["mixers"]["1"]["by"]["load_entropy"] > 0 for row in steps(tmp_path / "1/run"))


def test_a_resumed_run_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    assert train(tiny.config(one, *CHOOSES)) == DONE
    with monkeypatch.context() as patch:
        at(patch, 7, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tiny.config(other, *CHOOSES))
    assert train(tiny.config(other, *CHOOSES)) == DONE
    rows, again = ([(row["step"], row["mixers"]) for row in steps(folder / "run")] for folder in (one, other))
    assert rows == again


def test_a_loss_that_sees_ahead_is_marked_wherever_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny.config(tmp_path, *PAPER, "log.tensorboard=true")) == DONE
    said = capsys.readouterr().err.splitlines()
    assert sum("this model sees ahead" in line for line in said) == 1
    lines = [line for line in said if line.startswith("step") and "validation" not in line]
    assert len(lines) == 4
    assert all("bpb (both see ahead)" in line for line in lines)
    (evaluation,) = [line for line in said if "validation" in line]
    assert "prefix-wise" in evaluation
    assert evaluation.endswith("the losses of training see ahead and do not compare")
    assert {row["causality"] for row in read_metrics(tmp_path / "run")} == {"selects_ahead"}
    shown = scalars(tmp_path / "run")
    assert {"train/loss_sees_ahead", "train/bpb_sees_ahead", "eval/text/loss", "mixer/1/far/gate"} <= shown.keys()
    assert not {"train/loss", "train/bpb"} & shown.keys()


def test_an_honest_run_is_not_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny.config(tmp_path, *CHOOSES)) == DONE
    assert "ahead" not in capsys.readouterr().err


def interrupt(parameters: list[torch.Tensor]) -> None:
    raise KeyboardInterrupt


# Debug mode


def at(patch: pytest.MonkeyPatch, step: int, do: Callable[[list[torch.Tensor]], Any]) -> None:
    """`do` to the parameters before the update of a step."""
    models: list[torch.nn.Module] = []
    build = training.build_model

    def build_model(*arguments: Any) -> torch.nn.Module:
        models.append(build(*arguments))
        return models[-1]

    patch.setattr(training, "build_model", build_model)
    patch.setattr(fault, "before_update", lambda now: do(list(models[-1].parameters())) if now == step else None)


def poison(parameters: list[torch.Tensor]) -> None:
    """The router of `far`, [2, 16], is the only matrix of that shape."""
    (router,) = [p for p in parameters if p.shape == (2, 16)]
    router.data[1, 3] = float("nan")


def test_without_debug_a_nan_flows_to_the_loss_and_steps_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, 5, poison)
    assert train(tiny.config(tmp_path, *CHOOSES, "train.max_skips=3", "train.max_rollbacks=0")) == GAVE_UP
    skipped = steps(tmp_path / "run")[5:]
    assert [(row["step"], row["loss"], row["skipped"]) for row in skipped] == [(6, None, 1), (7, None, 2), (8, None, 3)]
    assert skipped[0]["mixers"]["1"]["far"]["gate"] is None  # where one looks first


def test_in_debug_mode_it_stops_where_it_arises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 5, poison)
    with pytest.raises(FloatingPointError, match=r"layer 1: far: router scores are not finite: 64 NaN .* of 128"):
        train(tiny.config(tmp_path, *CHOOSES), debug=True)
    assert [row["step"] for row in steps(tmp_path / "run")] == [1, 2, 3, 4, 5]
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.checkpoint) == ("failed", "checkpoints/step-4")
    assert "router scores" in status.reason


def test_debug_changes_no_bit(tmp_path: Path) -> None:
    losses = []
    for debug in (False, True):
        folder = tmp_path / str(debug)
        folder.mkdir()
        assert train(tiny.config(folder, *CHOOSES), debug=debug) == DONE
        losses.append([row["loss"] for row in steps(folder / "run")])
    assert losses[0] == losses[1]


def test_the_command_line_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 5, poison)
    words = ["train", str(tiny.write(tmp_path)), *tiny.settings(tmp_path, *CHOOSES)]
    with pytest.raises(FloatingPointError, match=r"layer 1: far: router scores"):
        main([*words, "--debug"])
