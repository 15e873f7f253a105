"""The static table of configurations: complete, and replaced by a file only if every row of it is one."""

import json
from types import SimpleNamespace

import pytest
import torch

from attention.kernels import configs
from attention.kernels.configs import (
    HOPPER,
    KERNELS,
    OTHER,
    TABLE,
    WIDTHS,
    Config,
    find_config,
    read_table,
    write_table,
)


def test_the_table_is_complete():
    expected = {(on, k, t, w) for on in (HOPPER, OTHER) for k in KERNELS for t in ("half", "single") for w in WIDTHS}
    assert set(TABLE) == expected
    assert set(configs.GATED) <= expected


def test_calls_with_a_gate_may_have_rows_of_their_own():
    plain, with_gate = (find_config("key_gradient", "half", 128, gated=gated) for gated in (False, True))
    assert plain == TABLE[HOPPER, "key_gradient", "half", 128]
    assert with_gate == configs.GATED[HOPPER, "key_gradient", "half", 128] != plain
    assert find_config("forward", "half", 16, gated=True) == TABLE[HOPPER, "forward", "half", 16]


@pytest.mark.parametrize(
    ("major", "minor", "kib", "on"),
    [(8, 0, 163, OTHER), (8, 9, 99, OTHER), (9, 0, 227, HOPPER), (10, 0, 227, HOPPER), (12, 0, 99, OTHER)],
)
def test_devices_find_their_rows(monkeypatch, major, minor, kib, on):
    has = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: has)
    configs.architecture.cache_clear()
    assert configs.architecture(torch.device("cuda", 0)) == on
    assert configs.architecture(torch.device("cpu")) == HOPPER
    configs.architecture.cache_clear()


def test_a_table_comes_back_as_it_was_written(tmp_path):
    write_table(TABLE, tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == TABLE


def test_rows_of_a_file_go_before_ours(tmp_path, monkeypatch):
    mine = Config(16, 16, 1, 1, False)
    write_table({(HOPPER, "forward", "half", 64): mine}, tmp_path / "mine.json")
    monkeypatch.setenv(configs.ENVIRONMENT, str(tmp_path / "mine.json"))
    configs._table.cache_clear()
    assert find_config("forward", "half", 64) == mine
    assert find_config("forward", "half", 128) == TABLE[HOPPER, "forward", "half", 128]
    monkeypatch.undo()
    configs._table.cache_clear()


ROW = {"architecture": 90, "kernel": "forward", "kind": "half", "width": 64}
SIDES = {"queries": 64, "keys": 64, "warps": 4, "stages": 2, "two_loops": True}


@pytest.mark.parametrize(
    "text",
    ["no json", "3", json.dumps([ROW]), json.dumps([{**ROW, **SIDES, "width": 63}]), json.dumps([{**SIDES}])],
)
def test_a_bad_table_is_named(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"LMTRAIN_KERNEL_CONFIGS: .*bad\.json"):
        read_table(path)
