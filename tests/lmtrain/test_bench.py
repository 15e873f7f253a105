"""What is measured, what is skipped, what is kept and said. No test looks at how long anything takes."""

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attention.lifetimes import Lifetimes, causal
from attention.mixer import MIXERS, Mixer, MixerOutput, build
from attention.ops.attend import attend
from lmtrain.bench import run as running
from lmtrain.bench.flex import flex_call
from lmtrain.bench.measure import Timing, peak_bytes
from lmtrain.bench.order import FILES, Order, read_order
from lmtrain.bench.report import Report
from lmtrain.bench.results import Results, Row, Skip
from lmtrain.bench.run import bench
from lmtrain.bench.subjects import (
    Attend,
    Bed,
    Flex,
    Heads,
    Sdpa,
    Subject,
    WholeMixer,
    heads_of,
    make_subjects,
    pattern_of,
)
from lmtrain.bench.tiles import Waste, format_waste, tile_waste
from lmtrain.bench.verdict import faster_from, verdicts
from lmtrain.config import ConfigError
from tests.lmtrain import tiny

CPU = torch.device("cpu")
BED = Bed(CPU, torch.float32)
MIXED = {
    "near": {"kind": "local", "heads": 4, "window": 8},
    "far": {"kind": "dense", "heads": 4},
    "few": {"kind": "local", "heads": 4, "kv_heads": 2, "window": 8},
    "wide": {"kind": "local", "heads": 4, "window": 30},
}


def named(subjects: list[Subject]) -> dict[tuple[str, str], Subject]:
    return {(subject.part, subject.name): subject for subject in subjects}


def order(folder: Path, **other: Any) -> Order:
    """Mixers of a tiny configuration at two lengths, once."""
    given = {"lengths": [64, 32], "repeats": 1, "device": "cpu", "out": str(folder / "out"), **other}
    overrides = tiny.settings(folder, *given.pop("overrides", ()))
    return read_order(str(tiny.write(folder)), overrides, **given)


def silent(line: str) -> None:
    """Say nothing."""


def test_each_mixer_stands_beside_dense_with_its_heads() -> None:
    subjects = named(make_subjects(MIXED, 16, BED))
    beside = {key: subject.baseline for key, subject in subjects.items()}
    assert beside == {
        ("mixer", "far"): None,
        ("mixer", "dense 4/2x4"): None,
        ("mixer", "near"): "far",
        ("mixer", "few"): "dense 4/2x4",
        ("mixer", "wide"): "far",
        ("attention", "SDPA 4x4"): None,
        ("attention", "SDPA 4/2x4"): None,
        ("attention", "near"): "SDPA 4x4",
        ("attention", "far"): "SDPA 4x4",
        ("attention", "few"): "SDPA 4/2x4",
        ("attention", "wide"): "SDPA 4x4",
    }
    dense = subjects["mixer", "dense 4/2x4"]
    assert isinstance(dense, WholeMixer)
    assert dense.mixer.config.kv_heads == 2
    assert dense.pairs(10) == subjects["attention", "SDPA 4/2x4"].pairs(10) == 4 * 55


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_can_be_benched(name: str) -> None:
    """As it comes: forward and both run, leave no gradients behind, and pairs are those of `cost`."""
    subjects = make_subjects({name: {"kind": name}}, 64, BED)
    for subject in subjects:
        assert subject.baseline is None or (subject.part, subject.baseline) in named(subjects)
        passes = subject.passes(40)
        passes.forward()
        passes.both()
        if subject.name == name:
            assert subject.pairs(300) == build(name, 64).cost(300).pairs
        if isinstance(subject, WholeMixer):
            assert all(parameter.grad is None for parameter in subject.mixer.parameters())
    assert any(isinstance(subject, WholeMixer) and subject.name == name for subject in subjects)


def test_both_is_forward_and_backward_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight and x get their gradients, in training mode; forward is without, in evaluation."""
    (dense, *_) = make_subjects({"far": MIXED["far"]}, 16, BED)
    assert isinstance(dense, WholeMixer)
    seen: list[tuple[bool, bool]] = []
    dense.mixer.register_forward_hook(lambda mixer, _, out: seen.append((mixer.training, out.y.requires_grad)))
    reached: list[Any] = []
    dense.mixer.register_full_backward_hook(lambda mixer, grads, _: reached.append(grads))
    monkeypatch.setattr(dense.mixer, "zero_grad", lambda: None)
    passes = dense.passes(12)
    passes.forward()
    assert (seen, reached) == ([(False, False)], [])
    passes.both()
    assert seen[1:] == [(True, True)]
    assert all(parameter.grad is not None for parameter in dense.mixer.parameters())


class TwoWeights(Mixer):
    """One weight is in y, the other in an auxiliary loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.in_y, self.in_loss = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.dropped: list[bool] = []

    def forward(self, x: torch.Tensor, ctx: Any = None, state: Any = None) -> MixerOutput:
        return MixerOutput(x * self.in_y, {"balance": self.in_loss**2})

    def after_step(self, skipped: bool = False) -> None:
        self.dropped.append(skipped)
        self.seen = [parameter.grad is not None for parameter in self.parameters()]


def test_auxiliary_losses_are_part_of_backward_and_sums_of_online_learning_are_dropped() -> None:
    mixer = TwoWeights()
    passes = WholeMixer("two", None, mixer, 8, BED).passes(4)
    passes.both()
    assert mixer.seen == [True, True]
    assert mixer.dropped == [True]


def test_memory_is_that_of_forward_and_backward() -> None:
    subject = make_subjects({"far": MIXED["far"]}, 16, BED)[0]
    passes, peak = running._warm(subject, 512, CPU)
    assert peak == peak_bytes(passes.both) > 1.5 * peak_bytes(passes.forward)


class Watched(Sdpa):
    """Remembers the types of its operands."""

    def prepare(self, length: int) -> Any:
        call, num_keys, _ = super().prepare(length)
        self.types: list[torch.dtype] = []

        def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.types += [q.dtype, k.dtype, v.dtype]
            return call(q, k, v)

        return watched, num_keys, None


def test_attention_runs_in_the_type_that_was_asked_for() -> None:
    subject = Watched("SDPA", None, Heads(4, 2, 8), Bed(CPU, torch.bfloat16))
    subject.passes(20).both()
    assert subject.types == [torch.bfloat16] * 3


def test_mixers_run_under_autocast() -> None:
    (dense, *_) = make_subjects({"far": MIXED["far"]}, 16, Bed(CPU, torch.bfloat16))
    assert isinstance(dense, WholeMixer)
    types: list[torch.dtype] = []
    dense.mixer.register_forward_hook(lambda mixer, _, out: types.append(out.y.dtype))
    passes = dense.passes(12)
    passes.forward()
    passes.both()
    assert types == [torch.bfloat16] * 2
    assert dense.mixer.qkv.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_has_the_predicate_of_the_lifetimes(kv_heads: int) -> None:
    """Uncompiled, on random lifetimes of more keys than queries."""
    generator = torch.Generator().manual_seed(0)
    birth = torch.randint(0, 100, (kv_heads, 150), generator=generator, dtype=torch.int32)
    birth[:, 0] = 0
    life = Lifetimes(birth, birth + torch.randint(0, 60, birth.shape, generator=generator, dtype=torch.int32))
    life.death[:, 0] = 1000  # nobody is left without a key
    q = torch.randn(1, 4, 128, 16, generator=generator)
    k, v = (torch.randn(1, kv_heads, 150, 16, generator=generator) for _ in range(2))
    call, seconds = flex_call(life, 128, 4, kv_heads, compile=False)
    torch.testing.assert_close(call(q, k, v), attend(q, k, v, life)[0], rtol=0, atol=1e-5)
    assert seconds > 0


def test_tiles_are_counted() -> None:
    """Dense causal: (n + 1) / 2 of n tiles per row; a window of 40 on two diagonals of tiles."""
    mixers = {"far": {"kind": "dense", "heads": 4}, "near": {"kind": "local", "heads": 4, "window": 40}}
    found = {waste.name: waste for waste in tile_waste(make_subjects(mixers, 16, BED), [1024])}
    tile = 128 * 128
    assert found["far"] == Waste("far", 1024, 4 * 1024 * 1025 // 2, 4 * 36 * tile, 4 * 36 * tile)
    assert found["near"] == Waste("near", 1024, 4 * (1024 * 40 - 39 * 20), 4 * 15 * tile, 4 * 15 * tile)
    assert "6.12 / 6.12" in format_waste(list(found.values()))
    peer = Flex("far (flex)", "SDPA 4x4", Heads(4, 4, 4), BED, causal)
    assert list(tile_waste([peer], [1024])) == []
    assert format_waste([]) == ""


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_a_pattern_means_attention_alone(name: str) -> None:
    has = pattern_of(build(name, 64)) is not None
    names = [s.name for s in make_subjects({name: {"kind": name}}, 64, BED) if isinstance(s, Attend)]
    assert names == ([name] if has else [])


def timing(median: float, apart: float = 0.0) -> Timing:
    return Timing(median, median - apart / 2, median + apart / 2)


def row(name: str, length: int, forward: Timing, both: Timing, **other: Any) -> Row:
    return Row(
        **{
            "name": name,
            "part": "mixer",
            "baseline": None if name == "dense" else "dense",
            "length": length,
            "forward": forward,
            "both": both,
            "peak_bytes": 1000,
            "pairs": 100.0,
            **other,
        }
    )


def invented() -> Results:
    """Linear beside quadratic: 4 ms against 1 ms at 1,024, equal near 4,096, with a spread of 1 ms at 4,096."""
    results = Results()
    for length in (1024, 2048, 4096, 8192):
        scale = length / 1024
        apart = 1e-3 if length == 4096 else 0.0
        results.rows.append(row("dense", length, timing(5e-4 * scale**2), timing(1e-3 * scale**2)))
        results.rows.append(
            row("new", length, timing(4e-4 * scale), timing(3.9e-3 * scale, apart), peak_bytes=1200, pairs=10.0)
        )
    return results


def test_the_verdict_says_where_a_mixer_loses() -> None:
    (sentence,) = verdicts(invented().comparisons())["new"]
    assert sentence == (
        "whole mixer beside dense: faster from 4,096 on (measured; the curves cross near 3,994); 2.05x at 8,192, where "
        "living pairs alone would allow 10.00x; slower forward + backward at 1,024 (0.26x), 2,048 (0.51x); holds 1.20 "
        "times the memory at 8,192."
    )


def test_the_verdict_of_a_loser_and_of_a_winner() -> None:
    results = invented()
    results.rows = [dataclasses.replace(r, both=timing(1.0)) if r.name == "new" else r for r in results.rows]
    (sentence,) = verdicts(results.comparisons())["new"]
    assert "loses everywhere up to 8,192; 0.06x at 8,192" in sentence
    results.rows = [dataclasses.replace(r, both=timing(1e-9)) if r.name == "new" else r for r in results.rows]
    (sentence,) = verdicts(results.comparisons())["new"]
    assert "faster from 1,024 on, the shortest measured" in sentence
    assert "slower nowhere" in sentence
    results.rows = [r for r in results.rows if r.name == "new"]
    (sentence,) = verdicts(results.comparisons())["new"]
    assert sentence == "whole mixer beside dense: never measured at one length."


def test_a_lead_within_the_spread_is_none() -> None:
    results = invented()
    results.rows = [dataclasses.replace(r, both=timing(r.both.median, 1.0)) for r in results.rows]
    (sentence,) = verdicts(results.comparisons())["new"]
    assert sentence.startswith("whole mixer beside dense: level with it at 8,192, the longest; 2.05x? at 8,192")
    (comparison,) = results.comparisons()
    assert faster_from(comparison, "both") == "4,096 (~3,994)?"
    assert faster_from(comparison, "forward") == "everywhere"


def test_what_overlaps_is_marked(tmp_path: Path) -> None:
    text = Report(order(tmp_path), invented(), []).format()
    assert "15.6 (1.03x?)" in text
    assert "31.2 (2.05x)" in text
    assert "T^1.00" in text
    assert "4,096 (~3,994)" in text
    assert "at most 6% of the median: new (mixer), forward + backward, 4,096 tokens" in text


def test_a_bench_from_order_to_files(tmp_path: Path) -> None:
    said: list[str] = []
    report = bench(order(tmp_path), said.append)
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    told = json.loads((folder / "bench.json").read_text())
    assert told == json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert told["protocol"]["lengths"] == [32, 64]
    assert told["protocol"]["mixers"]["near"]["window"] == 8
    assert told["protocol"]["seconds"] is None
    assert {"processor", "torch", "threads", "date"} <= set(told["environment"])
    names = {(r["part"], r["name"]) for r in told["rows"]}
    assert names == {
        ("mixer", "near"),
        ("mixer", "far"),
        ("attention", "near"),
        ("attention", "far"),
        ("attention", "SDPA 2x8"),
    }
    assert [r["length"] for r in told["rows"]] == [32] * 5 + [64] * 5
    near = next(r for r in told["rows"] if (r["name"], r["part"], r["length"]) == ("near", "mixer", 64))
    assert near["pairs"] == 2 * (64 * 8 - 28)
    assert near["bound"] == 64 * 65 / near["pairs"]
    assert near["baseline"] == "far"
    assert near["peak_bytes"] > 0
    assert near["forward_ms"]["least"] <= near["forward_ms"]["median"] <= near["forward_ms"]["most"]
    assert {(c["name"], c["part"]) for c in told["comparisons"]} == {
        ("near", "mixer"),
        ("near", "attention"),
        ("far", "attention"),
    }
    assert set(told["verdicts"]) == {"near", "far"}
    assert [w["length"] for w in told["tiles"]["patterns"] if w["name"] == "near"][-1] == 131072

    lines = list(csv.DictReader((folder / "bench.csv").open()))
    assert len(lines) == 10
    assert float(lines[0]["forward_backward_ms"]) == told["rows"][0]["forward_backward_ms"]["median"]
    assert float(lines[0]["forward_ms_most"]) == told["rows"][0]["forward_ms"]["most"]
    assert (folder / "bench.svg").read_text().count("Attention alone") == 1
    text = report.format()
    assert all(line in text for line in ("Whole mixers, forward: ms", "T=64", "attention alone beside SDPA 2x8"))
    assert said[-1].startswith("kept in")


def test_without_matplotlib_all_but_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    bench(order(tmp_path, lengths=[16]), said.append)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.csv", "bench.json"]
    assert "no bench.svg: matplotlib is not installed" in said


def test_lengths_that_take_too_long_are_skipped_aloud(tmp_path: Path) -> None:
    """The first one is measured, for nothing is known of it."""
    said: list[str] = []
    report = bench(dataclasses.replace(order(tmp_path), seconds=1e-9), said.append)
    assert report.results.lengths == [32]
    (skip,) = report.results.skipped
    assert (skip.length, skip.name) == (64, None)
    assert any(line.startswith("skipped at 64 tokens: all: would take about") for line in said)
    assert str(skip) in report.format()
    assert report.to_json()["skipped"][0]["length"] == 64


def test_what_needs_too_much_memory_is_skipped_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "free_memory", lambda device: 1)
    report = bench(order(tmp_path), silent)
    assert report.results.lengths == [32]
    assert len(report.results.skipped) == 5
    assert all("memory" in skip.reason and skip.length == 64 for skip in report.results.skipped)


def test_what_runs_out_of_memory_is_skipped_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(length: int) -> None:
        raise torch.OutOfMemoryError("tried to allocate too much\nand more")

    def subjects(*given: Any) -> list[Subject]:
        made = make_subjects(*given)
        monkeypatch.setattr(next(s for s in made if s.name == "near"), "passes", explode)
        return made

    monkeypatch.setattr(running, "make_subjects", subjects)
    report = bench(order(tmp_path), silent)
    assert report.results.skipped[0] == Skip(32, "near", "mixer", "tried to allocate too much")
    assert ("near", "mixer") not in {(r.name, r.part) for r in report.results.rows}


def test_an_interrupted_bench_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(line: str) -> None:
        if line.startswith("64 tokens"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(order(tmp_path), say)
    told = json.loads((tmp_path / "out/bench.json").read_text())
    assert {r["length"] for r in told["rows"]} == {32}


def test_an_order_for_all_registered_mixers() -> None:
    found = read_order(None, device="cpu")
    assert list(found.mixers) == sorted(MIXERS)
    assert (found.dim, found.dtype, found.repeats, found.seconds) == (512, "float32", 5, 120.0)
    assert found.lengths == (1024, 2048, 4096, 8192)
    assert found.out.parent == Path("bench")
    assert math.isinf(read_order(None, device="cpu", lengths=[64]).seconds)
    assert read_order(None, device="cpu", lengths=[64], seconds=3).seconds == 3


def test_overrides_of_registered_mixers() -> None:
    given = ["model.mixers.local.window=64", "model.mixers.wide={kind: local, window: 512}", "model.dim=256"]
    found = read_order(None, given, mixers=["local", "wide"], device="cpu")
    assert {name: mixer["window"] for name, mixer in found.mixers.items()} == {"local": 64, "wide": 512}
    assert found.dim == 256


def test_an_order_for_a_configuration_and_for_a_run(tmp_path: Path) -> None:
    found = order(tmp_path, overrides=["model.mixers.near.window=4", "model.pattern=far"], mixers=["near"])
    assert found.mixers["near"]["window"] == 4
    assert list(found.mixers) == ["near"]
    assert found.lengths == (32, 64)
    assert list(read_order("demo", device="cpu").mixers) == ["near", "far"]


def test_every_mistake_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bench.csv").write_text("years of work")
    wrong = ["train.dtype=float16", "model.mixers.near.heads=3", "model.pattern=far", "model.dimm=3"]
    with pytest.raises(ConfigError) as refused:
        order(tmp_path, overrides=wrong, mixers=["near", "neer"])
    said = str(refused.value)
    for words in (
        "heads 3 does not divide dim 16",
        "--mixers=neer: no such mixer here; did you mean near? (near, far)",
        "train.dtype=float16: needs a CUDA device",
        "holds bench.csv already; choose another folder",
        "model.dimm",
        "5 problems; nothing was started.",
    ):
        assert words in said
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        order(tmp_path, out=str(tmp_path / "out/bench.csv/more"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA device is here"):
        order(tmp_path, device="cuda")


def test_heads_of_settings() -> None:
    assert heads_of({"kind": "dense", "heads": 4, "kv_heads": 2, "head_dim": 24}, 64) == Heads(4, 2, 24)
    assert heads_of({"kind": "local", "heads": 4}, 64) == Heads(4, 4, 16)
    assert (str(Heads(8, 8, 64)), str(Heads(8, 2, 64))) == ("8x64", "8/2x64")
