"""The work list: every pair that lives is visited, and little else."""

import pytest
import torch

from attention.lifetimes import FOREVER, Lifetimes, causal, living_pairs, query_intervals, window
from attention.ops.attend import attend
from attention.ops.attend_plan import make_parts

LENGTH = 4096
TOKENS = torch.arange(LENGTH)


def lives(birth, death):
    return Lifetimes(birth.int(), death.int())


def combiner(span):
    ends = (torch.arange(LENGTH // span) + 1) * span
    death = torch.cat([(TOKENS // span + 1) * span, torch.full_like(ends, FOREVER)])
    return lives(torch.cat([TOKENS, ends]), death)


def random_lifespans():
    torch.manual_seed(0)
    return lives(TOKENS.expand(4, -1), TOKENS + (2 ** (10 * torch.rand(4, LENGTH))).long())


S2 = torch.where((TOKENS // 64 + 2 * torch.arange(4)[:, None]) % 8 == 0, FOREVER, (TOKENS // 64 + 4) * 64)
FIXED = torch.where(TOKENS % 128 >= 96, FOREVER, (TOKENS // 128 + 1) * 128)
# Most pairs visited per living one. A tile of 64 or 128 queries cannot do better than the keys it meets in all.
PATTERNS = {
    "causal": (causal(LENGTH), 1.05),
    "window 256": (window(LENGTH, 256), 1.3),
    "window 1024": (window(LENGTH, 1024), 1.15),
    "s2": (lives(TOKENS.expand(4, -1), S2), 1.25),
    "sparse fixed": (lives(TOKENS, FIXED), 1.3),
    "combiner": (combiner(64), 2.0),
    "random lifespans": (random_lifespans(), 1.6),
}


def parts_of(life, heads=4, group=1):
    keys = life.birth.shape[-1]
    sizes = {"heads": heads * group, "kv_heads": heads, "num_queries": LENGTH, "num_keys": keys}
    start, stop = query_intervals(life, None, **sizes)
    living = living_pairs(life, None, batch=1, **sizes)
    return make_parts(start, stop, batch=1, kv_heads=heads, group=group, num_queries=LENGTH), living


@pytest.mark.parametrize("name", PATTERNS)
def test_visits_little_more_than_what_lives(name):
    life, most = PATTERNS[name]
    parts, living = parts_of(life)
    visited = sum(
        (part.heads.stop - part.heads.start) * (tile.hi - tile.lo) * tile.width for part in parts for tile in part.tiles
    )
    assert living <= visited <= most * living


@pytest.mark.parametrize("name", PATTERNS)
def test_all_rows_and_queries_are_covered_once(name):
    parts, _ = parts_of(PATTERNS[name][0])
    heads = sorted(head for part in parts for head in range(part.heads.start, part.heads.stop))
    assert heads == [0, 1, 2, 3]
    for part in parts:
        ends = [0]
        for tile in part.tiles:
            assert tile.lo == ends[-1]
            ends.append(tile.hi)
        assert ends[-1] == LENGTH


def test_windows_fold():
    (part, *_), _ = parts_of(window(LENGTH, 128))
    assert max(tile.count for tile in part.tiles) > 10
    assert len(list(part.tiles)) < 10


def test_heads_of_unequal_work_walk_apart():
    life = lives(TOKENS.expand(4, -1), torch.stack([TOKENS + 8] * 3 + [torch.full_like(TOKENS, FOREVER)]))
    parts, living = parts_of(life)
    assert {(p.heads.start, p.heads.stop) for p in parts} == {(0, 3), (3, 4)}
    visited = sum((p.heads.stop - p.heads.start) * (t.hi - t.lo) * t.width for p in parts for t in p.tiles)
    assert visited <= 1.15 * living


def ranked(heads, clusters, width, length=LENGTH):
    """Tokens sorted by random clusters, of each head others: slices that differ by head."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randint(clusters, (heads, length), generator=generator).sort(-1).values
    ends = torch.searchsorted(cluster, cluster, right=True)
    tokens = torch.arange(length)
    return lives(tokens.expand(heads, -1), torch.minimum(tokens + width, ends))


def queries_of_each_head(heads):
    """Causal keys; every other query or so, of each head others, padded behind."""
    chosen = torch.rand(heads, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    time = torch.where(chosen, TOKENS, FOREVER).sort(-1).values[:, : int(chosen.sum(-1).max())]
    return time.int()[None]


def test_slices_that_differ_by_row_walk_alone():
    parts, living = parts_of(ranked(4, 4, 256))
    assert [part.listed for part in parts] == [False] * 4
    assert sum(len(part.tiles) for part in parts) < LENGTH / 64
    visited = sum((tile.hi - tile.lo) * tile.width for part in parts for tile in part.tiles)
    assert living <= visited <= 1.6 * living


def test_many_small_clusters_walk_together():
    parts, _ = parts_of(ranked(4, 64, 32))
    assert all(part.listed for part in parts)


@pytest.mark.parametrize("name", ["clusters", "chosen queries"])
def test_rows_that_walk_alone_are_the_definition(name):
    torch.manual_seed(0)
    life, time = (ranked(2, 2, 200, 1500), None) if name == "clusters" else (causal(LENGTH), queries_of_each_head(2))
    keys = life.birth.shape[-1]
    queries = keys if time is None else time.shape[-1]
    start, stop = query_intervals(life, time, heads=2, kv_heads=2, num_queries=queries, num_keys=keys)
    parts = make_parts(start, stop, batch=1, kv_heads=2, group=1, num_queries=queries)
    assert len(parts) == 2
    assert not any(part.listed for part in parts)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (queries, keys, keys))
    results = []
    for implementation in ("torch", "reference"):
        out, lse = attend(q, k, v, life, time=time, implementation=implementation)
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        results.append([out, finite, *torch.autograd.grad(out.square().sum() + finite.sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
