"""The search for kernel settings, on invented costs; and the way to its table, in Triton's interpreter."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from attention.kernels.configs import ENVIRONMENT, Config, Kernel, find_config, read_table, trying
from lmtrain.bench import tune as tuning
from lmtrain.bench.order import TABLE, Order, read_order
from lmtrain.bench.tune import Calls, descend, neighbours, race_of, tune
from lmtrain.config import ConfigError

START = Config(64, 64, 4, 2, False)
BEST = Config(128, 32, 8, 3, True)
CPU = torch.device("cpu")


def cost(config: Config) -> float:
    """Least for BEST, and more for each factor of two away from it."""
    away = [abs(math.log2(getattr(config, name) / getattr(BEST, name))) for name in ("queries", "keys", "warps")]
    return 1 + sum(away) + abs(config.stages - BEST.stages) + (config.two_loops != BEST.two_loops)


def race(configs: Sequence[Config]) -> dict[Config, float]:
    return {config: cost(config) for config in configs}


def test_neighbours_differ_in_one_setting() -> None:
    found = list(neighbours(START))
    assert len(found) == len(set(found)) == 3 + 3 + 1 + 3 + 1
    for config in found:
        both = zip(dataclasses.astuple(config), dataclasses.astuple(START), strict=True)
        assert sum(a != b for a, b in both) == 1


def test_the_search_goes_down_to_the_best() -> None:
    best, seconds = descend(START, race)
    assert best == BEST
    assert (seconds[START], seconds[BEST]) == (cost(START), 1.0)


def test_a_gain_within_the_noise_changes_nothing() -> None:
    best, _ = descend(START, lambda configs: {c: 1.0 if c == START else 0.985 for c in configs})
    assert best == START


def test_what_does_not_run_is_left_out() -> None:
    best, _ = descend(START, lambda configs: {c: cost(c) for c in configs if c.queries < 128 and not c.two_loops})
    assert best == dataclasses.replace(BEST, queries=64, two_loops=False)


def test_wrong_numbers_and_failures_do_not_race() -> None:
    """A call that computes what the configuration of the forward kernel makes of it."""

    def call() -> list[torch.Tensor]:
        config = find_config("forward", "single", 16)
        if config.warps == 8:
            raise RuntimeError("out of registers\nand more")
        return [torch.ones(3) * {1: torch.nan, 3: 1.1}.get(config.stages, 1.0)]

    said: list[str] = []
    found = race_of("forward", "single", 16, Calls([call], []), 1, CPU, said.append)(
        [START, dataclasses.replace(START, stages=1), dataclasses.replace(START, stages=3), BEST, START]
    )
    assert list(found) == [START]
    assert said == [
        "  64 x 64, 4 warps, 1 stages, one loop: wrong by inf",
        "  64 x 64, 4 warps, 3 stages, one loop: wrong by 0.1",
        "  128 x 32, 8 warps, 3 stages, two loops: out of registers",
    ]


@pytest.mark.parametrize("kernel", ["query_gradient", "key_gradient"])
def test_gradients_are_judged_by_the_backward_pass(kernel: Kernel) -> None:
    seen: list[Config] = []

    def backward() -> list[torch.Tensor]:
        seen.append(find_config(kernel, "single", 16))
        return [torch.ones(1)]

    race_of(kernel, "single", 16, Calls([], [backward]), 2, CPU, print)([BEST])
    assert seen[1:] == [BEST] * 3


def test_a_configuration_is_tried_and_taken_back() -> None:
    def interrupted() -> None:
        with trying((90, "forward", "half", 64), START):
            assert find_config("forward", "half", 64) == START
            assert find_config("forward", "half", 128) != START
            raise KeyboardInterrupt

    before = find_config("forward", "half", 64)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert find_config("forward", "half", 64) == before


def small_order(folder: Path) -> Order:
    settings = ["model.dim=40", "model.mixers.local.heads=2"]
    return read_order(None, settings, mixers=["local"], device="cpu", out=str(folder / "out"), repeats=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where a GPU is")
def test_the_table_is_one_that_the_kernels_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 20 are padded to 32; all three kernels, with one change to each that races."""
    monkeypatch.setattr(tuning, "HEADS", 1)
    monkeypatch.setattr(tuning, "LENGTH", 40)
    monkeypatch.setattr(tuning, "CHOICES", {"keys": (16, 32)})
    said: list[str] = []
    found = tune(small_order(tmp_path), said.append)
    assert [(row.kernel, row.kind, row.width) for row in found.rows] == [
        (kernel, "single", 32) for kernel in ("forward", "query_gradient", "key_gradient")
    ]
    assert said == [f"{row.kernel}, single, heads of 32" for row in found.rows]
    assert found.path == tmp_path / "out" / TABLE
    table = read_table(found.path)
    assert table == {(90, row.kernel, row.kind, row.width): row.after for row in found.rows}
    assert all(row.seconds_before > 0 and row.seconds_after > 0 for row in found.rows)
    assert found.rows[0].before == find_config("forward", "single", 32)
    assert f"export {ENVIRONMENT}={found.path}" in found.format()
    assert len(json.loads(json.dumps(found.to_json()))["rows"]) == 3


def test_what_the_tuner_refuses(tmp_path: Path) -> None:
    (tmp_path / TABLE).write_text("[]")
    with pytest.raises(ConfigError) as refused:
        read_order(None, device="cpu", lengths=[64], seconds=3, tune=True, out=str(tmp_path))
    said = str(refused.value)
    for words in ("--tune: needs a CUDA device", "--lengths: has no effect", "--seconds: has no effect", TABLE):
        assert words in said
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds bench\.json already"):
        read_order(None, device="cpu", out=str(tmp_path))
