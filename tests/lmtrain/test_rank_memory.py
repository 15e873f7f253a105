"""What is said of the memory of several ranks is what they hold."""

import dataclasses
import gc
import json
from typing import Any

import pytest
import torch

from launch.cli import main
from lmtrain.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from lmtrain.inspect import Asked, inspect
from lmtrain.model import DecoderLM
from lmtrain.optimizer import build_optimizer, torch_adamw
from lmtrain.rank_memory import Layout, bytes_of, layout_of, rank_memory, smallest_fit
from parallel.deepspeed import DeepSpeedEngine
from parallel.deepspeed_settings import LIVE_PARAMETERS, REDUCE_BUCKET
from parallel.engine import TorchEngine
from parallel.world import World
from tests.processes import run_ranks


def config(parallel: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> Config:
    given = {"dim": 120, "layers": 2, "ffn_dim": 300, "vocab_size": 500, "pattern": "a"}
    given["mixers"] = {"a": {"kind": "dense", "heads": 4}}
    return Config(
        data=DataConfig(seq_len=64),
        train=TrainConfig(**{"batch_tokens": 12 * 64, **train}),
        parallel=ParallelConfig(**(parallel or {})),
        model=ModelConfig(**{**given, **(model or {})}),
    )


def meta(given: Config) -> DecoderLM:
    with torch.device("meta"):
        return DecoderLM(given.model)


def live_bytes() -> int:
    """Of all tensors that Python knows, and their gradients, each memory once."""
    gc.collect()
    held = {}
    for tensor in (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)):
        for some in (tensor, tensor.grad if tensor.is_leaf else None):
            if some is not None and some.device.type == "cpu":
                storage = some.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def held(world: World, zero: int) -> tuple[int, int]:
    """Bytes that training holds between two steps, and between the backward pass and the update."""
    given = config()
    before = live_bytes()
    model = DecoderLM(given.model)
    engine: Any
    if zero:
        extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        optimizer = torch_adamw(model, given.optimizer)
        engine = DeepSpeedEngine(
            model, optimizer, stage=zero, extra=extra, world=world, device=torch.device("cpu"), clip=1.0
        )
        del optimizer
    else:
        engine = TorchEngine(model, build_optimizer(model, given.optimizer), device=torch.device("cpu"), world=world)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    sizes = []
    for _ in range(2):
        sizes = [live_bytes() - before]
        engine.backward(engine.forward_loss(tokens, tokens, None, 8, seed=0))
        sizes.append(live_bytes() - before)
        engine.step(1e-3)
    engine.close()
    return sizes[0], sizes[1]


def held_by_all(world: World) -> list[tuple[int, int]]:
    return [held(world, zero) for zero in range(4)]


def test_weights_gradients_and_moments_are_those_that_ranks_hold() -> None:
    """Within 2 %: small tensors of the model and of the engine are not in the estimate."""
    given = config()
    for rank, found in enumerate(run_ranks(2, held_by_all)):
        for zero, (idle, accumulated) in enumerate(found):
            memory = rank_memory(given, meta(given), layout_of(given, world=2, zero=zero))
            expected = memory.weights + memory.masters + memory.optimizer
            buffers = memory.buffers if zero == 3 else 0  # kept from step to step
            kept = memory.gradients + buffers if zero == 3 else 0
            assert idle == pytest.approx(expected + kept, rel=0.02), f"rank {rank}, ZeRO {zero}"
            grown = memory.gradients + (memory.buffers if zero in (1, 3) else 0)
            assert accumulated == pytest.approx(expected + grown, rel=0.02), f"rank {rank}, ZeRO {zero}"


def test_by_hand() -> None:
    given = config({"engine": "deepspeed", "zero": 2}, micro_batch=2)
    model = meta(given)
    p = sum(parameter.numel() for parameter in model.parameters())
    memory = rank_memory(given, model, layout_of(given, world=3))
    assert (memory.weights, memory.masters, memory.gradients) == (4 * p, -(-4 * p // 3), -(-4 * p // 3))
    assert memory.optimizer == pytest.approx(8 * p / 3, rel=1e-3)
    assert (memory.gathered, memory.buffers, memory.host) == (0, 4 * p, 0)
    assert memory.total == pytest.approx(
        memory.weights + memory.masters + memory.gradients + memory.optimizer + memory.buffers + memory.activations,
        rel=1e-6,
    )


def test_offload_moves_to_the_host_what_is_in_parts() -> None:
    given = config({"engine": "deepspeed", "zero": 3, "offload": True})
    model = meta(given)
    moved = rank_memory(given, model, layout_of(given, world=4))
    kept = rank_memory(given, model, dataclasses.replace(layout_of(given, world=4), offload=False))
    assert moved.host == kept.weights + kept.masters + kept.gradients + kept.optimizer
    assert moved.total == kept.total - moved.host
    assert (moved.weights, moved.masters, moved.gradients, moved.optimizer) == (0, 0, 0, 0)


def test_ranks_that_share_a_row_hold_its_tokens_in_parts() -> None:
    given = config()
    layout = layout_of(given, world=2)
    shared = rank_memory(given, meta(given), dataclasses.replace(layout, sequence=2))
    alone = rank_memory(given, meta(given), layout)
    assert shared.activations == pytest.approx(alone.activations / 2, rel=0.01)
    assert shared.weights == alone.weights


def test_a_large_model_is_bounded_by_deepspeeds_buffers_and_by_what_is_set() -> None:
    large = {"dim": 16384, "layers": 40, "ffn_dim": 65536}
    given = config({"engine": "deepspeed", "zero": 3}, large)
    memory = rank_memory(given, meta(given), layout_of(given, world=12))
    block = sum(p.numel() for p in meta(given).layers[0].parameters())
    assert block > LIVE_PARAMETERS
    assert (memory.gathered, memory.buffers) == (4 * block, 4 * REDUCE_BUCKET)
    extra = {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 2 * block}}
    given.parallel.deepspeed = extra
    memory = rank_memory(given, meta(given), layout_of(given, world=12))
    assert (memory.gathered, memory.buffers) == (4 * block, 4000)
    extra["zero_optimization"]["stage3_max_reuse_distance"] = 3 * block
    assert rank_memory(given, meta(given), layout_of(given, world=12)).gathered == 8 * block


def test_the_smallest_fit_is_the_first_that_fits() -> None:
    given = config()
    model = meta(given)

    def total(*layout: Any) -> int:
        return rank_memory(given, model, Layout(*layout)).total

    assert smallest_fit(given, model, total(1, 1, 0, 12, False)) == Layout(1, 1, 0, 12, False)
    assert smallest_fit(given, model, total(1, 1, 0, 12, False) - 1) == Layout(1, 1, 0, 6, False)
    assert smallest_fit(given, model, 0) is None
    found = smallest_fit(given, model, total(12, 1, 3, 1, True), zero=3, world=12)
    assert found == Layout(12, 1, 3, 1, True)
    least = total(1, 1, 0, 1, True)
    assert smallest_fit(given, model, least) == Layout(1, 1, 0, 1, True)
    more = smallest_fit(given, model, least - 1)
    assert more is not None
    assert more.world == 2, "the next number of ranks that shares the batch"
    smaller = [Layout(1, 1, zero, micro, on) for zero in range(4) for micro in (1, 2, 3, 4, 6, 12) for on in (0, 1)]
    assert all(rank_memory(given, model, layout).total >= least for layout in smaller)


def test_muon_fits_with_torch_alone() -> None:
    given = config()
    given.optimizer.kind = "muon"
    layout = smallest_fit(given, meta(given), 1, zero=2)
    assert layout is None


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("1.5k", 1500), ("1000", 1000), ("2 TiB", 2**41)]
)
def test_sizes_of_a_memory(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "3XB", "1e9", "5ib", "80 G B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size of a memory; write 80GB or 24GiB"):
        bytes_of(text)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(world=5), r"--world 5: the 12 sequences .* cannot be shared by 5; possible: 1, 2, 3, 4, 6, 12"),
        (Asked(world=24), r"--world 24: the 12 sequences"),
        (Asked(world=10, sequence=2), r"cannot be shared by 5; possible: 2, 4, 6, 8, 12, 24"),
        (Asked(world=3, sequence=2), r"--sequence 2: does not divide the 3 ranks of --world"),
    ],
)
def test_ranks_that_cannot_share(asked: Asked, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect(config(), asked)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["inspect", "demo", "train.batch_tokens=16384", "data.seq_len=1024", "--world", "4", "--zero", "3"]
    assert main([*small, "--memory", "24GiB", "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert (ranks["layout"]["world"], ranks["layout"]["zero"], ranks["limit_bytes"]) == (4, 3, 24 * 2**30)
    assert ranks["memory_bytes"]["total"] > ranks["memory_bytes"]["weights"] > 0
    assert ranks["smallest"]["layout"]["world"] == 4
    assert main([*small, "--memory", "10k"]) == 0
    assert "nothing fits 10,000 bytes a rank" in capsys.readouterr().out
    assert main([*small[:4], "--memory", "1TB", "--sequence", "2"]) == 0
    shown = capsys.readouterr().out
    assert "smallest that fits 1,000,000,000,000 bytes a rank: 2 ranks, the torch engine" in shown
    assert "parallel.engine=torch parallel.sequence=2 train.micro_batch=16" in shown
    assert main(["inspect", "demo", "--json"]) == 0
    assert "ranks" not in json.loads(capsys.readouterr().out)
