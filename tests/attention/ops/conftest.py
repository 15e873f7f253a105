"""Patterns of lifetimes that every path of `attend` must get right, small, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attention.lifetimes import FOREVER, Lifetimes, causal, window
from attention.ops import attend_plan, attend_route

T = 150  # a ragged third tile of 64


@dataclass
class Case:
    """Arguments of one call of `attend`."""

    q: Tensor
    k: Tensor
    v: Tensor
    life: Lifetimes
    time: Tensor | None = None
    key_bias: Tensor | None = None
    gate: tuple[Tensor, Tensor] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that has a gradient."""
        return [t for t in (self.q, self.k, self.v, self.key_bias, *(self.gate or ())) if t is not None]

    def call(self, attend: Callable[..., tuple[Tensor, Tensor]], **settings: object) -> tuple[Tensor, Tensor]:
        return attend(
            self.q, self.k, self.v, self.life, time=self.time, key_bias=self.key_bias, gate=self.gate, **settings
        )


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def case(
    life: Lifetimes,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = T,
    dim: int = 8,
    value_dim: int = 8,
    time: Tensor | None = None,
    bias: Tensor | None = None,
    gate: tuple[Tensor, Tensor] | None = None,
) -> Case:
    keys = life.birth.shape[-1]
    return Case(
        random(batch, heads, queries, dim),
        random(batch, kv_heads, keys, dim),
        random(batch, kv_heads, keys, value_dim),
        life,
        time,
        bias,
        gate,
    )


def ints(*values: Tensor) -> Lifetimes:
    return Lifetimes(*(v.to(torch.int32) for v in values))


TOKENS = torch.arange(T)


def blocks(size: int, length: int = T) -> Lifetimes:
    tokens = torch.arange(length)
    return ints(tokens, (tokens // size + 1) * size)


def document_ends(batch: int = 2) -> Tensor:
    cuts = torch.tensor([[0, 5, 6, 70, T], [0, 64, 100, 149, T]])[:batch]
    return torch.stack([c[1:][torch.searchsorted(c[1:], TOKENS, right=True)] for c in cuts])[:, None]


def documents() -> Case:
    return case(causal(T).until(document_ends().int()))


def windowed_documents() -> Case:
    return case(window(T, 20).until(document_ends().int()))


def s2() -> Case:
    """Local blocks, and forever the blocks of the key head's shard."""
    block, head = TOKENS // 8, torch.arange(2)[:, None]
    death = torch.where((block + head) % 4 == 0, FOREVER, (block + 2) * 8)
    return case(ints(TOKENS.expand(2, -1), death))


def sparse_fixed() -> Case:
    """Own block, and forever its last columns; the two generations named."""
    summary = TOKENS % 16 >= 12
    death = torch.where(summary, FOREVER, (TOKENS // 16 + 1) * 16)
    return case(ints(TOKENS, death, summary))


def combiner() -> Case:
    """Tokens of the own block, and one key per complete block, born at its end."""
    ends = (torch.arange(T // 16) + 1) * 16
    birth = torch.cat([TOKENS, ends])
    death = torch.cat([(TOKENS // 16 + 1) * 16, torch.full_like(ends, FOREVER)])
    return case(ints(birth, death), value_dim=6)


def summaries_only() -> Case:
    """The first queries meet nobody."""
    ends = (torch.arange(T // 16) + 1) * 16
    return case(ints(ends, torch.full_like(ends, FOREVER)))


def random_deaths() -> Case:
    """Per batch row and key head; lifespans over three octaves, some never alive, some never born; generations."""
    span = (2 ** (torch.rand(2, 2, T) * 8)).long() - 1
    birth = TOKENS.expand(2, 2, -1).clone()
    birth[..., 7::31] = FOREVER
    return case(ints(birth, (birth + span).clamp(max=FOREVER), (span > 8).int() + (span > 64)))


def shuffled_births() -> Case:
    birth = torch.randint(0, T, (2, 1, 99))
    return case(ints(birth, birth + torch.randint(0, 40, (2, 1, 99))))


def padded_queries() -> Case:
    """Per-head times with gaps, padding at FOREVER last: queries that chose their head."""
    time = torch.sort(torch.rand(2, 4, T), dim=-1).indices.sort(-1).values[..., ::2].contiguous()
    time = (time + torch.tensor([0, 1, 0, 1])[:, None]).int()
    time[0, 1, 40:] = FOREVER
    time[1, 2] = FOREVER
    return case(causal(T), queries=time.shape[-1], time=time)


def padded_lists() -> Case:
    """Per-head times, and lists that are no slices."""
    padded = padded_queries()
    return Case(padded.q, padded.k, padded.v, s2().life, padded.time)


def biased(with_infinity: bool) -> Case:
    bias = random(2, T)
    if with_infinity:
        bias[:, 3:60:4] = -torch.inf
        bias[1, :40] = -torch.inf
    return case(window(T, 30), bias=bias)


def gated() -> Case:
    """Shares of 0, between, and 1; some thresholds open wide, some rows that nobody passes."""
    u, tau = random(2, 2, T), random(2, 4, T)
    tau[:, :, ::5] = -torch.inf
    tau[:, 1, 60:70] = 50.0
    return case(window(T, 40), bias=random(2, 2, T), gate=(u, tau))


def gated_lists() -> Case:
    drawn = random_deaths()
    return case(drawn.life, gate=(random(2, 2, T), random(2, 4, T)))


def unequal_heads() -> Case:
    """One key head dense, one with short lists: they walk apart."""
    death = torch.stack([torch.full_like(TOKENS, FOREVER), TOKENS + 3])
    return case(ints(TOKENS.expand(2, -1), death))


def decode() -> Case:
    """One query, late; two keys are dead, one is not yet born."""
    birth = torch.arange(40)
    death = torch.full_like(birth, FOREVER)
    death[:2] = 10
    return case(ints(birth, death), queries=1, time=torch.tensor([38], dtype=torch.int32))


def chunk() -> Case:
    """Twenty more tokens behind a cache of sixty."""
    birth = torch.arange(80)
    return case(ints(birth, birth + 50), queries=20, time=torch.arange(60, 80, dtype=torch.int32))


CASES: dict[str, Callable[[], Case]] = {
    "causal": lambda: case(causal(T)),
    "causal, one token": lambda: case(causal(1), queries=1),
    "causal, all heads own keys": lambda: case(causal(T), kv_heads=4),
    "causal, one key head": lambda: case(causal(T), kv_heads=1),
    "causal, wide values": lambda: case(causal(T), value_dim=12),
    "causal, narrow values": lambda: case(causal(T), value_dim=5),
    "window": lambda: case(window(T, 37)),
    "window, one key head": lambda: case(window(T, 37), kv_heads=1),
    "window of one": lambda: case(window(T, 1)),
    "window wider than all": lambda: case(window(T, 1000)),
    "window, born a step late": lambda: case(ints(TOKENS + 1, TOKENS + 9)),
    "blocks": lambda: case(blocks(25)),
    "blocks, ragged": lambda: case(blocks(16)),
    "blocks, narrow values": lambda: case(blocks(16), value_dim=5),
    "documents": documents,
    "windowed documents": windowed_documents,
    "s2": s2,
    "sparse fixed": sparse_fixed,
    "combiner": combiner,
    "summaries only": summaries_only,
    "random deaths": random_deaths,
    "shuffled births": shuffled_births,
    "padded queries": padded_queries,
    "padded queries, lists": padded_lists,
    "biased": lambda: biased(with_infinity=False),
    "biased to -inf": lambda: biased(with_infinity=True),
    "gated": gated,
    "gated lists": gated_lists,
    "unequal heads": unequal_heads,
    "decode": decode,
    "chunk": chunk,
    "no keys": lambda: case(causal(0), queries=5),
}


@pytest.fixture(params=CASES)
def drawn(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


def in_default_time() -> list[str]:
    drawn = {name: build() for name, build in CASES.items()}
    return [name for name, c in drawn.items() if c.time is None and c.q.shape[2] == T]


@pytest.fixture(params=in_default_time())
def drawn_in_default_time(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


@pytest.fixture(params=["random deaths", "shuffled births", "gated lists", "s2", "sparse fixed", "combiner"])
def drawn_with_lists(request: pytest.FixtureRequest) -> Case:
    """Of those the ones whose keys are no slices."""
    torch.manual_seed(0)
    return CASES[request.param]()


def long_window(**settings: int) -> Case:
    return case(window(700, 37), queries=700, **settings)


def long_documents() -> Case:
    ends = torch.tensor([3, 400, 700])
    tokens = torch.arange(700)
    drawn = window(700, 60).until(ends[torch.searchsorted(ends, tokens, right=True)].int())
    return case(drawn, queries=700, bias=random(2, 2, 700), gate=(random(2, 2, 700), random(2, 4, 700)))


LONG_CASES: dict[str, Callable[[], Case]] = {
    "window": long_window,
    "window, one key head": lambda: long_window(kv_heads=1),
    "window, narrow values": lambda: long_window(value_dim=3),
    "documents, biased and gated": long_documents,
}


@pytest.fixture(params=LONG_CASES)
def drawn_long(request: pytest.FixtureRequest) -> Case:
    """Slices that move on with the queries for many tiles."""
    torch.manual_seed(0)
    return LONG_CASES[request.param]()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything through the tile loop, few rows at a time."""
    monkeypatch.setattr(attend_plan, "SMALL", 0)
    monkeypatch.setattr(attend_plan, "FEW_QUERIES", 0)
    monkeypatch.setattr(attend_plan, "LOGITS", 64 * 2 * 80 * 2)
    monkeypatch.setattr(attend_route, "_remembered", [])


@pytest.fixture
def no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device where the fused causal kernel is missing."""
    monkeypatch.setattr(attend_route, "find_segments", lambda *args: None)
    monkeypatch.setattr(attend_route, "_remembered", [])
