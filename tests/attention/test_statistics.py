"""What the mixers say of themselves, against counts by loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.mixer import Context, Mixer, build
from attention.statistics import binary_entropy, entropy, share
from tests.conformance.oracle import load

DIM = 16


def ready(kind: str, **settings: Any) -> Any:
    """In float64, always from the same seed."""
    torch.manual_seed(0)
    return build(kind, DIM, **settings).double()


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def said(mixer: Mixer, x: Tensor, **about: Any) -> dict[str, float]:
    """What the mixer reports of x."""
    statistics: dict[str, Tensor] = {}
    mixer(x, Context(statistics=statistics, **about))
    return {name: float(value) for name, value in statistics.items()}


def close(number: float) -> Any:
    return pytest.approx(number, rel=1e-6, abs=1e-9)


def test_entropies() -> None:
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(entropy(p), torch.tensor([1.0, 0.0, 0.5]))
    assert entropy(torch.ones(1)) == 1  # one entry is as even as it can be
    torch.testing.assert_close(binary_entropy(torch.tensor([0.0, 0.5, 0.25])), torch.tensor([0.0, 1.0, 0.8112781]))
    assert share(torch.tensor([True, False, False, False])) == 0.25


# mosa

SMALL = {"heads": 3, "head_dim": 4, "keep": 5}


def active(mixer: Any, x: Tensor) -> list[list[list[int]]]:
    """For each row and head the tokens of a document that are active: sorted by hand, or, paper, the best of all."""
    kept, last = load("mosa").kept, x.shape[1] - 1
    rows = []
    for row in x:
        scores = (row @ mixer.router.weight.T).T.tolist()
        if mixer.config.selection == "paper":
            rows.append([kept(mixer.config, s, last) for s in scores])
        else:
            rows.append([[t for t in range(last + 1) if t in kept(mixer.config, s, t)] for s in scores])
    return rows


@pytest.mark.parametrize("selection", ["strict", "paper"])
@pytest.mark.parametrize(("include_first", "keep"), [(True, 5), (True, 2), (False, 5), (False, 1), (False, 60)])
def test_mosa_by_loops(selection: str, include_first: bool, keep: int) -> None:
    mixer, x = ready("mosa", selection=selection, include_first=include_first, **SMALL | {"keep": keep}), tokens(40)
    mine = active(mixer, x)
    counts = torch.tensor([[len(head) for head in row] for row in mine]) / 40
    gates = [
        [torch.sigmoid(x[b, t] @ mixer.router.weight[h]).item() for t in mine[b][h]] for b in range(2) for h in range(3)
    ]
    flat = [gate for head in gates for gate in head]
    bits = [-g * math.log2(g) - (1 - g) * math.log2(1 - g) for g in flat]
    u = keep - include_first
    expected = include_first + sum(min(1, u / j) for j in range(1, 41 - include_first))
    if selection == "paper":
        expected = min(keep, 40)
    assert said(mixer, x) == {
        "active_share": close(float(counts.mean())),
        "busiest_head": close(float(counts.mean(0).max())),
        "overflow": close(float(counts.max()) * 40 / expected),
        "gate": close(sum(flat) / len(flat)),
        "router_entropy": close(sum(bits) / len(bits)),
        "dead_heads": 0.0,
    }


def test_mosa_expects_of_each_document_its_own() -> None:
    """Rising scores: all are active. Of two documents more are expected than of one."""
    mixer, x = ready("mosa", **SMALL), tokens(40, batch=1)
    with torch.no_grad():
        mixer.router.weight.zero_()[:, 0] = 1.0
    x[..., 0] = torch.arange(40)
    expected = [1 + sum(min(1, 4 / j) for j in range(1, length)) for length in (40, 12, 28)]
    positions = torch.cat([torch.arange(12), torch.arange(28)])[None]
    assert said(mixer, x)["overflow"] == close(40 / expected[0])
    assert said(mixer, x, positions=positions)["overflow"] == close(40 / (expected[1] + expected[2]))
    state = mixer.init_state(1)
    mixer(x[:, :30], None, state)
    statistics: dict[str, Tensor] = {}
    mixer(x[:, 30:], Context(statistics=statistics), state)
    assert float(statistics["overflow"]) == close(10 / sum(4 / j for j in range(30, 40)))


def test_mosa_with_a_head_that_is_switched_off() -> None:
    mixer, x = ready("mosa", **SMALL), tokens(40)
    x[..., 0] = 1.0
    with torch.no_grad():
        mixer.router.weight.zero_()[1, 0] = -9.0
    numbers = said(mixer, x)
    assert numbers["dead_heads"] == close(1 / 3)
    off = 1 / (1 + math.exp(9))
    bits = -off * math.log2(off) - (1 - off) * math.log2(1 - off)
    assert numbers["router_entropy"] == close((2 + bits) / 3)  # the others do not know
    assert numbers["gate"] == close((1 + off) / 3)
    assert numbers["active_share"] == numbers["busiest_head"] == 1.0  # all tie, so the newest is always among the best


# routing


def clusters(mixer: Any, x: Tensor) -> list[tuple[int, list[int]]]:
    """For each row and head its number and the clusters of its tokens."""
    oracle, means = load("routing"), mixer.centroids.means
    c = oracle.shared_vectors(mixer, x).detach()
    return [(h, [oracle.nearest(t, means[h]) for t in c[b, h]]) for b in range(len(c)) for h in range(c.shape[1])]


@pytest.mark.parametrize("selection", ["strict", "paper"])
def test_routing_by_loops(selection: str) -> None:
    mixer, x = ready("routing", heads=2, clusters=7, window=2, selection=selection), tokens(12)
    mine, c = clusters(mixer, x), load("routing").shared_vectors(mixer, x).detach()
    loads = torch.zeros(2, 7)
    for h, taken in mine:
        for cluster in taken:
            loads[h, cluster] += 1 / 24
    nats = [-sum(float(p) * math.log(p) for p in of_head if p > 0) for of_head in loads]
    squares = [
        (c[i // 2, h, t] - mixer.centroids.means[h, cluster]).square().mean().item()
        for i, (h, taken) in enumerate(mine)
        for t, cluster in enumerate(taken)
    ]
    expected = {
        "dead_clusters": close(float((loads == 0).sum()) / 14),
        "overloaded": close(float(loads.max()) * 7),
        "load_entropy": close(sum(nats) / 2 / math.log(7)),
        "centroid_distance": close(sum(squares) / len(squares)),
    }
    assert (loads == 0).any()
    if selection == "strict":
        binds = [taken[: t + 1].count(cluster) > 2 for _, taken in mine for t, cluster in enumerate(taken)]
        assert sum(binds) > 0
        expected["window_binds"] = close(sum(binds) / len(binds))
    else:
        unserved = 0
        for b in range(2):
            for h in range(2):
                nearness = c[b, h] @ mixer.centroids.means[h].T
                served = {t for j in range(7) for t in sorted(range(12), key=lambda t: -float(nearness[t, j]))[:2]}
                unserved += 12 - len(served)
        assert unserved > 0
        expected["unserved"] = close(unserved / 48)
    assert said(mixer, x) == expected


def test_routing_with_one_cluster_binds_by_document() -> None:
    mixer, x = ready("routing", heads=2, clusters=1, window=4), tokens(20)
    positions = torch.cat([torch.arange(3), torch.arange(17)]).expand(2, -1)
    assert said(mixer, x)["window_binds"] == close(16 / 20)
    numbers = said(mixer, x, positions=positions)
    assert numbers["window_binds"] == close(13 / 20)
    assert (numbers["load_entropy"], numbers["overloaded"], numbers["dead_clusters"]) == (1.0, 1.0, 0.0)
    assert said(ready("routing", heads=2, clusters=1, window=50), x)["window_binds"] == 0.0


# moh


def test_moh_by_loops() -> None:
    mixer, x = ready("moh", heads=8, shared_heads=2, active_heads=2), tokens(9)
    torch.nn.init.normal_(mixer.router.weight, std=0.7)
    loads, nats, shared = [0.0] * 6, [], []
    for token in x.flatten(0, 1):
        logits = mixer.router.weight.detach() @ token
        p = logits[:6].softmax(0)
        for head in p.topk(2).indices.tolist():
            loads[head] += 1 / 36
        nats.append(-float((p * p.log()).sum()))
        shared.append(float(logits[8:].softmax(0)[0]))
    assert said(mixer, x) == {
        "load_entropy": close(-sum(p * math.log(p) for p in loads if p) / math.log(6)),
        "least_loaded": close(min(loads) * 6),
        "most_loaded": close(max(loads) * 6),
        "dead_heads": close(loads.count(0.0) / 6),
        "router_entropy": close(sum(nats) / 18 / math.log(6)),
        "shared_branch": close(sum(shared) / 18),
    }


def test_moh_of_which_one_head_is_always_chosen() -> None:
    mixer, x = ready("moh", heads=8, shared_heads=2, active_heads=1), tokens(9)
    x[..., 0] = 1.0
    with torch.no_grad():
        mixer.router.weight.zero_()[3, 0] = 99.0
    numbers = said(mixer, x)
    assert (numbers["load_entropy"], numbers["router_entropy"]) == (close(0.0), close(0.0))
    assert (numbers["least_loaded"], numbers["most_loaded"], numbers["dead_heads"]) == (0.0, close(6.0), close(5 / 6))
    assert numbers["shared_branch"] == close(0.5)


def test_moh_with_one_kind_of_head() -> None:
    assert said(ready("moh", shared_heads=8, active_heads=0), tokens(9)) == {}
    assert "shared_branch" not in said(ready("moh", shared_heads=0), tokens(9))


def test_dense_attention_has_nothing_to_say() -> None:
    assert said(ready("dense"), tokens(9)) == {}
