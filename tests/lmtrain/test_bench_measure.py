"""How time and memory are taken."""

import time

import pytest
import torch

from lmtrain.bench.measure import Timing, environment, peak_bytes, timed_in_turn


def test_repeats_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """a, b, a, b, ...: on an invented clock, of which each call takes its share."""
    clock, calls = [0.0], []
    taken = {"a": [1.0, 5.0, 3.0], "b": [2.0, 2.0, 8.0]}

    def call(name: str) -> None:
        calls.append(name)
        clock[0] += taken[name][(len(calls) - 1) // 2]

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    found = timed_in_turn({name: lambda name=name: call(name) for name in taken}, 3)
    assert calls == ["a", "b"] * 3
    assert found == {"a": Timing(3.0, 1.0, 5.0), "b": Timing(2.0, 2.0, 8.0)}
    assert found["b"].spread == 3.0


def test_peak_is_what_is_held_at_one_time() -> None:
    megabyte = 2**18  # floats

    def one_after_the_other() -> None:
        for _ in range(4):
            torch.empty(megabyte).fill_(1.0)

    def side_by_side() -> list[torch.Tensor]:
        return [torch.empty(megabyte).fill_(1.0) for _ in range(4)]

    assert peak_bytes(one_after_the_other) == pytest.approx(2**20, rel=0.01)
    assert peak_bytes(side_by_side) == pytest.approx(4 * 2**20, rel=0.01)


def test_the_environment_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/me/.venv/bin/lmtrain", "bench", "--out", "/home/me/results"])
    assert environment()["command"] == "lmtrain bench --out results"
    assert environment()["torch"] == torch.__version__
