"""What is said of a model before it is made is true of the model that is made."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from attention.mixer import MIXERS
from lmtrain import checkpoint
from lmtrain.config import Config, DataConfig, ModelConfig, TrainConfig
from lmtrain.inspect import inspect, list_mixers
from lmtrain.model import DecoderLM
from lmtrain.optimizer import build_optimizer

MIXED = {
    "near": {"kind": "local", "heads": 4, "window": 16},
    "far": {"kind": "dense", "heads": 8, "kv_heads": 2},
}


def config(model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, length: int = 128) -> Config:
    """Four layers, of which the last sees everything."""
    given = {"dim": 64, "layers": 4, "vocab_size": 256, "mixers": MIXED, "pattern": "near near near far"}
    return Config(
        data=DataConfig(seq_len=length),
        train=TrainConfig(**{"batch_tokens": 16 * length, "micro_batch": 4, **(train or {})}),
        model=ModelConfig(**{**given, **(model or {})}),
    )


@pytest.mark.parametrize(
    "settings", [{}, {"tied": True, "ffn": "gelu"}, {"learned_positions": 200, "norm": "layernorm"}]
)
def test_parts_add_up_to_the_model(settings: dict[str, Any]) -> None:
    given = config(settings)
    model = DecoderLM(given.model)
    found = inspect(given)
    assert found.total == model.cost(128)
    assert found.total.parameters == sum(p.numel() for p in model.parameters())
    names = [part.name for part in found.parts if part.layer == 3]
    assert names == ["far", "ffn", "norms"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_memory_that_needs_no_estimate(kind: str, tmp_path: Path) -> None:
    """Weights, moments and checkpoint as they are; 12 bytes per parameter with AdamW, state as decoding holds it."""
    given = config()
    given.optimizer.kind = kind  # type: ignore[assignment]
    model = DecoderLM(given.model)
    optimizer = build_optimizer(model, given.optimizer)
    found = inspect(given)
    parameters = sum(p.numel() for p in model.parameters())
    assert found.memory.weights == found.memory.gradients == 4 * parameters
    assert found.memory.optimizer == sum(t.nbytes for t in optimizer.state().values())
    written = checkpoint.save(tmp_path, 1, {"model": model.state_dict(), "optimizer": optimizer.state()}, {})
    size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    assert found.checkpoint_bytes <= size <= found.checkpoint_bytes + 50_000
    if kind == "adamw":
        assert 12 * parameters <= found.checkpoint_bytes <= 12 * parameters + 1000

    state = model.init_state(1)
    with torch.no_grad():
        model(torch.zeros(1, 128, dtype=torch.int64), None, state)
    assert found.total.state_bytes == state.bytes


class LivePeak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile held at once, each memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self.watch(tensor.untyped_storage())
        return output

    def watch(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, storage._cdata)
            self.peak = max(self.peak, sum(self.live.values()))


def measured_peak(given: Config) -> int:
    """Of the forward and backward pass of one micro-batch, weights and their gradients aside."""
    model = DecoderLM(given.model)
    model.activation_checkpointing = given.train.activation_checkpointing
    tokens = torch.zeros(4, given.data.seq_len, dtype=torch.int64)
    narrow = given.train.dtype != "float32"
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LivePeak() as live, torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        total, _, _ = model.loss(tokens, tokens)
        total.backward()
    return live.peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"ffn": "gelu"}, {"norm": "layernorm"}, {"dim": 128}],
    ids=["swiglu", "gelu", "layernorm", "wide"],
)
def test_the_peak_of_training_is_estimated_within_a_quarter(
    settings: dict[str, Any], dtype: str, checkpointing: bool
) -> None:
    given = config(settings, {"dtype": dtype, "activation_checkpointing": checkpointing}, length=256)
    memory = inspect(given).memory
    estimate = memory.training - memory.weights - memory.gradients - memory.optimizer
    assert measured_peak(given) == pytest.approx(estimate, rel=0.25)


def test_activation_checkpointing_saves_memory() -> None:
    plain, recomputed = (inspect(config(train={"activation_checkpointing": on})).memory for on in (False, True))
    assert recomputed.training < plain.training
    assert recomputed.activations_checkpointed == plain.activations_checkpointed < 0.6 * plain.activations


def test_nothing_is_made() -> None:
    """A model of half a trillion parameters is inspected where no machine could hold it."""
    huge = {"dim": 16384, "layers": 126, "vocab_size": 128_000, "mixers": {"a": {"kind": "dense", "heads": 128}}}
    found = inspect(config({**huge, "pattern": "a"}, length=8192))
    assert found.total.parameters > 4e11
    assert found.to_json()["flops_per_token"]["forward"] > 2 * 4e11


def test_an_unknown_vocabulary_is_said_to_be_assumed() -> None:
    found = inspect(config({"vocab_size": None}))
    assert "256 is assumed" in found.note
    assert "256 is assumed" in found.format()
    assert found.config["model"]["vocab_size"] == 256


def test_json_and_text_say_the_same() -> None:
    found = inspect(config())
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["seq_len"] == 128
    assert told["causality"] == "strict"
    assert told["parameters"] == found.total.parameters == sum(told["parameters_by_part"].values())
    assert told["flops_per_token"]["training"] == 3 * told["flops_per_token"]["forward"]
    assert told["pairs_per_token"] == sum(part["pairs_per_token"] for part in told["parts"])
    assert told["state_bytes"] == sum(part["state_bytes"] for part in told["parts"])
    assert told["micro_batch"] == 4
    text = found.format()
    assert "layers 0-2 each near" in text
    assert "layer 3 far" in text
    assert f"{found.total.parameters:,}" in text
    assert "seq_len: 128" in text


def test_mixers_are_listed_with_what_they_cost() -> None:
    listed = list_mixers(4096)
    assert [row.name for row in listed.rows] == sorted(MIXERS)
    by_name = {row.name: row for row in listed.rows}
    assert by_name["dense"].pairs == 4097 / 2
    assert by_name["dense"].state_bytes == 2 * 64 * 4
    assert by_name["local"].pairs == pytest.approx(256 - 256 * 255 / 2 / 4096)
    assert by_name["local"].state_bytes == 255 * 2 * 64 * 4 / 4096
    assert all(row.idea.endswith(".") for row in listed.rows)
    assert all(row.name in listed.format() for row in listed.rows)
    assert len(json.loads(json.dumps(listed.to_json(), allow_nan=False))["mixers"]) == len(MIXERS)
