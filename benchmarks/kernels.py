"""The Triton kernels of `attend` on a GPU, in one call: right first, then fast, beside SDPA and FlexAttention.

    python benchmarks/kernels.py [--lengths 4096,8192,16384,32768,65536] [--repeats 9] [--quick] [--json FILE]

1. The machine: versions, clocks, copy bandwidth, an 8192^3 product in bfloat16; random data, never zeros.
2. Correctness of every type, width and option against float64 on the CPU: fresh random inputs, memory poisoned with
   NaN, two runs bit for bit. A failure ends the run with exit code 4: there is no speed of wrong numbers.
3. Speed of every pattern, forward and forward + backward, batch 1, 16 heads: milliseconds, TFLOP/s of living pairs, and
   ratios within this run: to SDPA, to FlexAttention with the same predicate, and to what the visited tiles allow
   (`over bound`: t / (rho x own dense t), rho = visited / dense causal tiles).
4. What planning costs beside attention, for keys chosen by scores.
5. A training step of a 12-layer model at 8,192 tokens: milliseconds, tokens per second, peak memory.

On a machine without a GPU `--quick` runs sections 2 and 4 in Triton's interpreter, to see that the script works.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

from report import publish, table

from attention.kernels.plan import Plan
from attention.lifetimes import FOREVER, Lifetimes, living_pairs
from attention.mixer import build
from attention.ops.attend import attend, attend_reference
from lmtrain.bench.measure import Timing, now, peak_bytes, timed_in_turn
from lmtrain.bench.subjects import Attend, Bed, Flex, Heads, Sdpa, Subject, UnavailableError
from lmtrain.bench.tiles import tile_waste

HEADS = 16
PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "window 256": {"kind": "local", "window": 256},
    "window 1024": {"kind": "local", "window": 1024},
    "sparse fixed 128, 8": {"kind": "sparse", "block": 128, "columns": 8},
    "sparse fixed 512, 32": {"kind": "sparse", "block": 512, "columns": 32},
    "s2 64, 16, 8": {"kind": "s2", "block": 64, "local_blocks": 16, "stride": 8},
    "combiner fixed 64": {"kind": "combiner", "span": 64},
    "combiner fixed 256": {"kind": "combiner", "span": 256},
}
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 5e-3), torch.bfloat16: (5e-3, 1e-2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="no timings of attention")
    parser.add_argument("--json", help="where to keep the rows")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.quick:
        parser.error("no CUDA device: only --quick runs here")
    rows = list(machine(device))
    checked = list(correctness(device, small=device.type == "cpu"))
    print(table(checked))
    if any(row["wrong"] for row in checked):
        print("wrong numbers: nothing is timed", file=sys.stderr)
        return 4
    rows += planning(device, 4096 if device.type == "cpu" else 65536, arguments.repeats)
    if not arguments.quick:
        lengths = [int(length) for length in arguments.lengths.split(",")]
        rows += speed(device, lengths, arguments.repeats)
        rows.append(training_step(device, arguments.repeats))
    publish([{"what": None, "length": None, **row} for row in _alike(rows)], arguments.json)
    return 0


def _alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one table: what a row does not say is None."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def machine(device: torch.device) -> Iterator[dict[str, Any]]:
    """What the device does at best, by torch's own operations."""
    if device.type != "cuda":
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    print(subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
    big = torch.randn(2**28, device=device)
    target = torch.empty_like(big)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(big), "product": lambda: a @ b}
    for run in runs.values():
        run()
    times = timed_in_turn(runs, 9, device)
    yield {"what": "copy", "TB/s": 2 * big.nbytes / times["copy"].median / 1e12}
    yield {"what": "product 8192^3", "TFLOP/s": 2 * 8192**3 / times["product"].median / 1e12}


def correctness(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    """Largest relative L2 error of outputs and of gradients for each type, width and option."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    length = 60 if small else 1000
    widths = [(16, 16), (40, 24)] if small else [(16, 16), (40, 24), (32, 32), (64, 64), (128, 128), (256, 256)]
    for dtype in TOLERANCES:
        for width, value_width in widths:
            for options in ("", "bias", "bias and gate"):
                errors = [_errors(life, width, value_width, options, dtype, device) for life in small_patterns(length)]
                outputs, gradients = (max(e[i] for e in errors) for i in (0, 1))
                wrong = outputs > TOLERANCES[dtype][0] or gradients > TOLERANCES[dtype][1]
                yield {
                    "type": str(dtype).removeprefix("torch."),
                    "widths": f"{width}, {value_width}",
                    "options": options or "none",
                    "outputs": outputs,
                    "gradients": gradients,
                    "same bits again": all(e[2] for e in errors),
                    "wrong": wrong or not all(e[2] for e in errors),
                }
    torch.use_deterministic_algorithms(False)


def small_patterns(length: int) -> Iterator[Lifetimes]:
    """Dense, window, immortals among mortals, and random deaths in generations, with keys that never live."""
    token = torch.arange(length)
    death = [torch.full_like(token, FOREVER), token + 37, torch.where(token % 8 < 2, FOREVER, token + 20)]
    for d in death:
        yield Lifetimes(token.int(), d.int())
    span = (2 ** (9 * torch.rand(2, length))).int() - 1
    yield Lifetimes(token.int().expand(2, -1).contiguous(), token.int() + span, (span > 30).int())


def _errors(
    life: Lifetimes, width: int, value_width: int, options: str, dtype: torch.dtype, device: torch.device
) -> tuple[float, float, bool]:
    length = life.birth.shape[-1]
    exact = [
        torch.randn(1, heads, length, w).to(dtype).double() for heads, w in ((4, width), (2, width), (2, value_width))
    ]
    if options:
        exact.append(torch.randn(1, 2, length).double())
    if "gate" in options:
        exact += [torch.randn(1, 2, length).float().double() + 1, torch.randn(1, 4, length).float().double()]
    exact = [x.float().double() if number > 2 else x for number, x in enumerate(exact)]
    dout, dlse = torch.randn(1, 4, length, value_width), torch.randn(1, 4, length)

    def run(
        function: Callable[..., Any], on: torch.device, narrow: torch.dtype, wide: torch.dtype
    ) -> list[torch.Tensor]:
        leaves = [x.to(on, narrow if number < 3 else wide).requires_grad_() for number, x in enumerate(exact)]
        here = Lifetimes(*(None if t is None else t.to(on) for t in (life.birth, life.death, life.generation)))  # type: ignore[arg-type]
        bias, gate = (leaves[3] if options else None), (tuple(leaves[4:]) if "gate" in options else None)
        more = {"implementation": "triton"} if function is attend else {}
        out, lse = function(*leaves[:3], here, key_bias=bias, gate=gate, **more)
        score = (out * dout.to(out)).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse.to(lse)).sum()
        return [t.detach().cpu().double() for t in (out, lse, *torch.autograd.grad(score, leaves))]

    first, second = (run(attend, device, dtype, torch.float32) for _ in range(2))
    truth = run(attend_reference, torch.device("cpu"), torch.float64, torch.float64)
    errors = [_relative(ours, theirs) for ours, theirs in zip(first, truth, strict=True)]
    return max(errors[:2]), max(errors[2:]), all(map(torch.equal, first, second))


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    finite = theirs.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return torch.inf
    return float((ours - theirs)[finite].norm() / theirs[finite].norm())


def speed(device: torch.device, lengths: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """Every pattern at every length, beside its peers, by heads and widths."""
    bed = Bed(device, torch.bfloat16)
    for kv_heads, width in ((16, 64), (16, 128), (4, 128)):
        heads = Heads(HEADS, kv_heads, width)
        mixers = {
            n: build(s["kind"], HEADS * width, heads=HEADS, kv_heads=kv_heads, **_rest(s)) for n, s in PATTERNS.items()
        }
        for length in lengths:
            ours = {name: Attend(name, None, heads, bed, mixer.pattern) for name, mixer in mixers.items()}  # type: ignore[operator]
            flex = {name: Flex(name, None, heads, bed, mixer.pattern) for name, mixer in mixers.items()}  # type: ignore[operator]
            subjects: dict[str, Subject] = {"SDPA": Sdpa("SDPA", None, heads, bed)}
            subjects |= ours | {f"{name} (flex)": subject for name, subject in flex.items()}
            forward, both = _times(subjects, length, repeats, device)
            for name, subject in subjects.items():
                if name in forward:
                    yield _row(name, subject, length, heads, forward, both)
            bed.clear()


def _rest(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "kind"}


def _times(
    subjects: dict[str, Subject], length: int, repeats: int, device: torch.device
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    passes = {}
    for name, subject in subjects.items():
        try:
            passes[name] = subject.passes(length)
            passes[name].forward()
            passes[name].both()
        except (UnavailableError, torch.OutOfMemoryError) as error:
            print(f"{name} at {length}: {str(error).splitlines()[0]}", file=sys.stderr)
            passes.pop(name, None)
    forward = timed_in_turn({name: p.forward for name, p in passes.items()}, repeats, device)
    return forward, timed_in_turn({name: p.both for name, p in passes.items()}, repeats, device)


def _row(
    name: str, subject: Subject, length: int, heads: Heads, forward: dict[str, Timing], both: dict[str, Timing]
) -> dict[str, Any]:
    pairs = subject.pairs(length)
    row: dict[str, Any] = {
        "what": f"{name}, {heads}",
        "length": length,
        "forward ms": 1e3 * forward[name].median,
        "both ms": 1e3 * both[name].median,
        "TFLOP/s": 4 * heads.width * pairs / forward[name].median / 1e12,
        "both TFLOP/s": 14 * heads.width * pairs / both[name].median / 1e12,
        "over SDPA": both[name].median / both["SDPA"].median,
    }
    if isinstance(subject, Attend) and not isinstance(subject, Flex):
        flex = f"{name} (flex)"
        row["over flex"] = both[name].median / both[flex].median if flex in both else None
        (waste,) = tile_waste([subject], [length])
        rho = (waste.forward + waste.backward) / _dense_tiles(length, heads)
        row["rho"] = rho
        row["over bound"] = both[name].median / (rho * both["dense"].median) if "dense" in both else None
    return row


def _dense_tiles(length: int, heads: Heads) -> int:
    tiles = -(-length // 128)
    return heads.heads * tiles * (tiles + 1) * 128 * 128


def planning(device: torch.device, length: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of a plan made anew, forward and backward, for 16 heads of random deaths."""
    birth = torch.arange(length, dtype=torch.int32, device=device).expand(1, HEADS, -1).contiguous()
    span = (2 ** (11 * torch.rand(1, HEADS, length, device=device))).int()
    life = Lifetimes(birth, birth + span, (span > 128).int())
    time = torch.arange(length, dtype=torch.int32, device=device)

    def plan() -> None:
        made = Plan(life, time, kv_heads=HEADS, num_keys=length)
        made.query_runs(128, 128)
        made.key_tiles(128, 128, batch=1, heads=HEADS)

    plan()
    row = {
        "what": "plan of random deaths",
        "length": length,
        "forward ms": 1e3 * timed_in_turn({0: plan}, repeats, device)[0].median,
    }
    if device.type == "cuda":
        q, k, v = (torch.randn(1, HEADS, length, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
        attention = timed_in_turn({0: lambda: attend(q, k, v, life)}, repeats, device)[0].median
        row["attention ms"] = 1e3 * attention
        sizes = {"batch": 1, "heads": HEADS, "kv_heads": HEADS, "num_queries": length, "num_keys": length}
        row["TFLOP/s"] = 4 * 128 * living_pairs(life, None, **sizes) / attention / 1e12
    yield row


def training_step(device: torch.device, repeats: int) -> dict[str, Any]:
    """Of `near near dense`, 12 layers of width 1,024, bytes, bfloat16."""
    from lmtrain.config import load
    from lmtrain.setup import build_engine, build_model

    overrides = [
        "model.vocab_size=256",
        "model.dim=1024",
        "model.layers=12",
        "train.dtype=bfloat16",
        "data.seq_len=8192",
    ]
    overrides += ["model.mixers={near: {kind: local, heads: 8, window: 1024}, all: {kind: dense, heads: 8}}"]
    config = load("demo", [*overrides, "model.pattern=near near all", "train.batch_tokens=8192"])
    engine = build_engine(config, build_model(config, device), device)
    tokens = torch.randint(256, (1, 8193), device=device)

    def step() -> None:
        engine.backward(engine.forward_loss(tokens[:, :-1], tokens[:, 1:], None, 8192, 0))
        engine.step(1e-4)

    step()
    peak = peak_bytes(step, device)
    begin = now(device)
    for _ in range(repeats):
        step()
    seconds = (now(device) - begin) / repeats
    return {
        "what": "training step",
        "length": 8192,
        "both ms": 1e3 * seconds,
        "tokens/s": 8192 / seconds,
        "GiB": peak / 2**30,
    }


if __name__ == "__main__":
    sys.exit(main())
