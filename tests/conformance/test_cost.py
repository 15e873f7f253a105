"""Point 9: what a mixer says it costs is what it costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attention.mixer import Mixer, build, parameter_count
from attention.ops import codes_native
from tests.conformance.oracle import Subject
from tests.conformance.sequences import Tokens

LENGTHS = [1, 3, 17, 70]


@torch.no_grad()
def counted_flops(mixer: Mixer, tokens: Tokens) -> float:
    """Of one forward pass, per sequence, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        tokens.run(mixer)
    return counter.get_total_flops() / tokens.x.shape[0]


@pytest.fixture
def products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts products; a C++ kernel sums values by code without one, and what that costs elsewhere is stated."""
    monkeypatch.setattr(codes_native, "takes", lambda v: False)


@pytest.mark.usefixtures("products_alone")
@pytest.mark.parametrize("length", LENGTHS)
def test_flops(subject: Subject, length: int) -> None:
    mixer = subject.mixer(torch.float32)
    stated = mixer.cost(length).flops
    if subject.selects:
        # An expectation over exchangeable scores: the mean over 64 sequences comes within 3 %.
        tokens = Tokens.random(64, length, subject.case.dim).to(torch.float32)
        counted = counted_flops(mixer, tokens)
        if subject.bounded:
            # Of a single token everything is known.
            assert counted <= stated
            assert length > 1 or counted == stated
        else:
            assert counted == pytest.approx(stated, rel=0.03)
    else:
        tokens = Tokens.random(1, length, subject.case.dim).to(torch.float32)
        assert counted_flops(mixer, tokens) == stated


@pytest.mark.parametrize("length", LENGTHS)
def test_pairs(subject: Subject, length: int) -> None:
    mixer = subject.mixer()
    assert mixer.cost(length).pairs == pytest.approx(subject.oracle.pairs(mixer, length), rel=1e-9)


def test_parameters(subject: Subject) -> None:
    mixer = subject.mixer()
    assert mixer.cost(5).parameters == parameter_count(mixer)


def test_cost_needs_no_weights(subject: Subject) -> None:
    with torch.device("meta"):
        mixer = build(subject.kind, subject.case.dim, **subject.case.settings)
        assert all(p.is_meta for p in mixer.parameters())
        inside = mixer.cost(70)
    assert inside == mixer.cost(70) == subject.mixer(torch.float32).cost(70)


@pytest.mark.parametrize("length", LENGTHS)
def test_pattern(subject: Subject, length: int) -> None:
    """A static mixer's lifetimes fit [kv_heads, keys], and the pairs they make are those it states."""
    mixer = subject.mixer()
    assert hasattr(mixer, "pattern") == subject.has_pattern(mixer)
    if not subject.has_pattern(mixer):
        return
    life = mixer.pattern(length)
    assert life.birth.dtype == life.death.dtype == torch.int32
    kv_heads = mixer.config.kv_heads or mixer.config.heads
    keys = max(life.birth.shape[-1], life.death.shape[-1])
    birth, death = (t.expand(kv_heads, keys) for t in (life.birth, life.death))
    time = torch.arange(length)[:, None, None]
    met = int(((birth <= time) & (time < death)).sum())
    assert met * (mixer.config.heads // kv_heads) == mixer.cost(length).pairs
