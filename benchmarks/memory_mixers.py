"""Mixers whose memory does not grow with what they read, beside dense attention; and a moving average beside FFT.

    python benchmarks/memory_mixers.py [--parts speed growth average decoding] [--threads 2] [--json FILE]

Whole mixers at width 256, float32, batch 1, random inputs, in turn within one process:

speed     forward + backward at --length tokens; `speed-up` is over `dense` with 4 heads of 64
growth    the same from --growth shortest to longest; `exponent` e: time grows as T^e between these two; `peak` is what
          a pass allocates beside its inputs, in bytes per token
average   `diagonal_scan` of 256 channels with 16 numbers each beside the same sums by FFT; `error`: relative, in L2, to
          the recurrence in float64; `leak`: the largest change of an output in the first half, once the inputs of the
          second half are 1000 times as large
decoding  one token at a time, the last --decoded tokens up to each of --marks: most bytes that the state held, and the
          median time of a token. What comes before is read in segments
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from report import alternated, publish_tables
from torch import Tensor

from attention.mixer import Mixer, build
from attention.ops.scan import diagonal_scan, diagonal_scan_reference
from lmtrain.bench.measure import peak_bytes

DIM = 256
DENSE = "dense"
CODES: dict[str, Any] = {"heads": 4, "block": 256, "codes": 256}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    DENSE: (DENSE, {"heads": 4}),
    "mega": ("mega", {"chunk": 512}),
    "vq": ("vq", CODES),
    "vq, positions none": ("vq", {**CODES, "positions": "none"}),
}
SEGMENT = 4096

Rows = list[dict[str, Any]]


def both(mixer: Mixer, length: int) -> Callable[[], None]:
    """A forward and backward pass, to parameters and inputs."""
    x = torch.randn(1, length, DIM, requires_grad=True)
    dy = torch.randn(1, length, DIM)
    leaves = [x, *mixer.parameters()]

    def run() -> None:
        output = mixer(x)
        score = (output.y * dy).sum() + sum(output.losses.values())
        torch.autograd.grad(score, leaves)

    return run


def speed(mixers: dict[str, Mixer], arguments: argparse.Namespace) -> Rows:
    """One row for each mixer, `dense` first."""
    runs = {name: both(mixer, arguments.length) for name, mixer in mixers.items()}
    seconds = alternated(runs, arguments.repeats)
    return [
        {
            "mixer": name,
            "T": arguments.length,
            "forward + backward ms": 1e3 * taken,
            "speed-up": seconds[DENSE] / taken,
            "pairs": mixers[name].cost(arguments.length).pairs,
        }
        for name, taken in seconds.items()
    ]


def growth(mixers: dict[str, Mixer], arguments: argparse.Namespace) -> Rows:
    """One row for each mixer but `dense`, whose growth is known."""
    short, long = min(arguments.growth), max(arguments.growth)
    rows = []
    for name, mixer in mixers.items():
        if name == DENSE:
            continue
        runs = {length: both(mixer, length) for length in arguments.growth}
        seconds = alternated(runs, arguments.repeats)
        times = {f"T={length} ms": 1e3 * taken for length, taken in seconds.items()}
        exponent = math.log(seconds[long] / seconds[short]) / math.log(long / short)
        peaks = {f"peak at {length}": peak_bytes(runs[length]) / length for length in (short, long)}
        rows.append({"mixer": name, **times, "exponent": exponent, **peaks})
    return rows


def by_fft(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y of `diagonal_scan` as one convolution for each channel, in twice the length so that nothing comes round."""
    length = x.shape[1]
    powers = (log_decay[..., None] * torch.arange(length)).exp()
    taps = torch.einsum("cn,cnt->ct", b * c, powers)
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=2 * length) * torch.fft.rfft(taps, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)


def average(arguments: argparse.Namespace) -> Rows:
    """The scan, and the FFT, with the decays that Mega starts from."""
    length, numbers = arguments.length, 16
    a, d = (torch.sigmoid(0.2 * torch.randn(DIM, numbers)) for _ in range(2))
    parameters = torch.log1p(-a * d), a * torch.randn(DIM, numbers), torch.randn(DIM, numbers)
    x, dy = torch.randn(1, length, DIM), torch.randn(1, length, DIM)
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    later = torch.arange(length)[:, None] >= length // 2
    with torch.no_grad():
        exact = diagonal_scan_reference(*(t.double() for t in leaves))[0]
        louder = torch.where(later, 1000 * x, x)
    ways: dict[str, Callable[..., Tensor]] = {"scan": lambda *t: diagonal_scan(*t)[0], "FFT": by_fft}

    def forward(way: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                way(*leaves)

        return run

    forwards = alternated({name: forward(way) for name, way in ways.items()}, arguments.repeats)
    passes = alternated(
        {name: lambda way=way: torch.autograd.grad(way(*leaves), leaves, dy) for name, way in ways.items()},
        arguments.repeats,
    )
    rows = []
    for name, way in ways.items():
        with torch.no_grad():
            y, changed = way(*leaves), way(louder, *leaves[1:])
        rows.append(
            {
                "way": name,
                "T": length,
                "forward ms": 1e3 * forwards[name],
                "forward + backward ms": 1e3 * passes[name],
                "error": float((y - exact).norm() / exact.norm()),
                "leak": float((changed - y)[:, : length // 2].abs().max()),
            }
        )
    return rows


@torch.no_grad()
def decoding(mixers: dict[str, Mixer], arguments: argparse.Namespace) -> Rows:
    """One row for each mixer."""
    rows = []
    for name, mixer in mixers.items():
        mixer.eval()
        state, done, row = mixer.init_state(1), 0, {"mixer": name}
        for mark in sorted(arguments.marks):
            while done < mark - arguments.decoded:
                segment = min(SEGMENT, mark - arguments.decoded - done)
                mixer(torch.randn(1, segment, DIM), None, state)
                done += segment
            taken, held = [], []
            while done < mark:
                token = torch.randn(1, 1, DIM)
                begin = time.perf_counter()
                mixer(token, None, state)
                taken.append(time.perf_counter() - begin)
                held.append(state.bytes)
                done += 1
            row |= {f"bytes at {mark}": max(held), f"ms at {mark}": 1e3 * median(taken)}
        rows.append(row)
        mixer.train()
    return rows


PARTS = ("speed", "growth", "average", "decoding")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--length", type=int, default=16384, help="tokens, of speed and average")
    parser.add_argument("--growth", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens")
    parser.add_argument("--marks", type=int, nargs="+", default=[1024, 8192, 65536], help="tokens")
    parser.add_argument("--decoded", type=int, default=256, help="tokens up to a mark")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="where to keep the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    mixers = {name: build(kind, DIM, **settings) for name, (kind, settings) in SETTINGS.items()}
    makers: dict[str, Callable[[], Rows]] = {
        "speed": lambda: speed(mixers, arguments),
        "growth": lambda: growth(mixers, arguments),
        "average": lambda: average(arguments),
        "decoding": lambda: decoding(mixers, arguments),
    }
    publish_tables({part: makers[part]() for part in arguments.parts}, arguments.json)


if __name__ == "__main__":
    main()
