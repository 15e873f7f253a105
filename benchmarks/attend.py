"""`attend` against torch's dense causal attention: time of forward and backward, living pairs, peak memory.

    python benchmarks/attend.py [--length 8192] [--repeats 7] [--threads 2] [--device cpu] [--json FILE]

float32, batch 1, 4 heads of 64, random inputs, all patterns in turn within one run. `speed-up` is over
`scaled_dot_product_attention(is_causal=True)`, `bound` what the living pairs alone would allow (dense causal
pairs / living pairs); peak memory is what forward and backward allocate beside the inputs, in bytes per token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import alternated, publish

from attention.lifetimes import FOREVER, Lifetimes, causal, living_pairs, window
from attention.ops.attend import attend
from lmtrain.bench.measure import peak_bytes

HEADS, DIM = 4, 64
DENSE = "SDPA causal"


def patterns(length: int) -> dict[str, Lifetimes]:
    """What the rows are named after; all but the selected keys are static."""
    generator = torch.Generator().manual_seed(0)
    token, head = torch.arange(length), torch.arange(HEADS)[:, None]
    block = token // 64
    shard = torch.where((block + 2 * head) % 8 == 0, FOREVER, (block + 4) * 64)
    summary = torch.where(token % 128 >= 96, FOREVER, (token // 128 + 1) * 128)
    cuts = torch.randint(length, (max(1, length // 1000),), generator=generator).sort().values
    ends = torch.cat([cuts, torch.tensor([length])])
    document_end = ends[torch.searchsorted(ends, token, right=True)].int()
    lifespan = (2 ** (11 * torch.rand(HEADS, length, generator=generator))).int()
    birth = token.int()
    return {
        "causal": causal(length),
        "window 128": window(length, 128),
        "window 1024": window(length, 1024),
        "blocks 256": Lifetimes(birth, ((token // 256 + 1) * 256).int()),
        "documents of 1000": causal(length).until(document_end),
        "documents, window 256": window(length, 256).until(document_end),
        "sparse fixed (128, 32)": Lifetimes(birth, summary.int()),
        "s2 (64, 4, 8)": Lifetimes(birth.expand(HEADS, -1), shard.int()),
        "random lifespans to 2048": Lifetimes(birth.expand(HEADS, -1), birth + lifespan),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="where to keep the rows")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    shape = (1, HEADS, arguments.length, DIM)
    q, k, v = (torch.randn(shape, device=arguments.device, requires_grad=True) for _ in range(3))
    dout = torch.randn(shape, device=arguments.device)
    lives = {
        name: Lifetimes(life.birth.to(q.device), life.death.to(q.device))
        for name, life in patterns(arguments.length).items()
    }

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def ours(name: str) -> Callable[[], torch.Tensor]:
        return lambda: attend(q, k, v, lives[name])[0]

    def forward(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                call()
            _synchronize(q)

        return run

    def both(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(call(), (q, k, v), dout)
            _synchronize(q)

        return run

    calls = {DENSE: dense, **{name: ours(name) for name in lives}}
    forward_seconds = alternated({n: forward(call) for n, call in calls.items()}, arguments.repeats)
    both_seconds = alternated({n: both(call) for n, call in calls.items()}, arguments.repeats)
    all_pairs = _pairs(causal(arguments.length), arguments.length)
    rows = []
    for name, call in calls.items():
        pairs = all_pairs if name == DENSE else _pairs(lives[name], arguments.length)
        rows.append(
            {
                "pattern": name,
                "forward ms": 1e3 * forward_seconds[name],
                "forward + backward ms": 1e3 * both_seconds[name],
                "speed-up": both_seconds[DENSE] / both_seconds[name],
                "bound": all_pairs / pairs,
                "peak bytes per token": peak_bytes(both(call), q.device) // arguments.length,
            }
        )
    publish(rows, arguments.json)


def _pairs(life: Lifetimes, length: int) -> int:
    return living_pairs(life, batch=1, heads=HEADS, kv_heads=HEADS, num_queries=length, num_keys=length)


def _synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
