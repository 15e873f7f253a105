"""Transformer-VQ: its limits, its codebook, its state, and what other implementations got wrong."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention.clock import Clock
from attention.mixer import Context, build, read_settings
from attention.vq import VQ
from tests.conformance.oracle import load, triangle

ORACLE = load("vq")
DIM = 16


def ready(seed: int = 0, **settings: Any) -> VQ:
    """In float64, all weights of order one."""
    torch.manual_seed(seed)
    mixer = build("vq", DIM, **{"heads": 4, "kv_heads": 2, "codes": 5, "block": 4} | settings).double()
    assert isinstance(mixer, VQ)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def tokens(length: int, seed: int = 1, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# Limits


@pytest.mark.parametrize("positions", ["xl", "none"])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16])
def test_up_to_two_blocks_it_is_dense_over_codes_and_keys_learn(length: int, positions: str) -> None:
    mixer, x = ready(block=8, positions=positions), tokens(length).requires_grad_()
    q, k, v = ORACLE.vectors(mixer, x)
    quantised = ORACLE.quantised(mixer, k.detach()) + k - k.detach()
    expected = ORACLE.output(mixer, x, ORACLE.attention(mixer, q, quantised, quantised, v))
    y = mixer(x).y
    same(y, expected)
    ours, theirs = (torch.autograd.grad(t.square().sum(), mixer.key.weight)[0] for t in (y, expected))
    same(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("positions", ["xl", "none"])
def test_a_codebook_of_all_keys_is_attention_without_quantisation(positions: str) -> None:
    mixer, x = ready(codes=40, positions=positions), tokens(40, rows=1)
    q, k, v = ORACLE.vectors(mixer, x)
    mixer.codebook.means.copy_(k[0])
    same(mixer(x).y, ORACLE.output(mixer, x, ORACLE.attention(mixer, q, k, k, v)))


def test_one_code_is_a_mean_beyond_the_window() -> None:
    """Without window logits, too: one code, no positions. Every query has the mean of all values so far."""
    mixer, x = ready(codes=1, positions="none"), tokens(30)
    v = ORACLE.vectors(mixer, x)[2].repeat_interleave(2, 1)
    mean = v.cumsum(2) / torch.arange(1, 31)[:, None]
    same(mixer(x).y, ORACLE.output(mixer, x, mean))


def test_without_positions_blocks_do_not_matter() -> None:
    x = tokens(50)
    first, *others = (ready(block=block, positions="none")(x).y for block in (1, 3, 4, 7, 25, 49, 60))
    for other in others:
        same(other, first)


def test_what_keys_learn_depends_on_blocks() -> None:
    """Two blocks back they learn nothing, so longer blocks teach more."""
    x, found = tokens(50), []
    for block in (1, 8, 60):
        mixer = ready(block=block, positions="none")
        found.append(torch.autograd.grad(mixer(x).y.square().sum(), mixer.key.weight)[0])
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.combinations(found, 2))


def test_values_and_queries_learn_from_everything() -> None:
    mixer, x = ready(), tokens(40)
    q, k, v = (t.detach().requires_grad_() for t in ORACLE.vectors(mixer, x))
    code = torch.zeros(2, 2, 40, dtype=torch.int32)
    out = mixer.mix(q, k, code, v, Clock.plain(40), None)
    dq, dk, dv = torch.autograd.grad(out[:, :, -1].square().sum(), [q, k, v])
    assert dq[:, :, -1].any()
    assert dv.abs().sum(-1).all()
    assert not dk[:, :, :32].any()  # the last query reads blocks 8 and 9 of 4 tokens
    assert dk[:, :, 32:].any()


def test_over_many_tiles_it_is_its_definition() -> None:
    mixer, x = ready(block=24, codes=9), tokens(300, rows=1).requires_grad_()
    y, expected = mixer(x).y, ORACLE.definition(mixer, x, Context())
    same(y, expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    same(ours, theirs, atol=1e-9)


def test_codes_that_nobody_has_are_met_by_nobody() -> None:
    """Far away ones: were an empty code met, its huge logit would take everything."""
    mixer, x = ready(), tokens(40)
    y = mixer(x).y
    far = ready(codes=8)
    far.codebook.means[:, 5:] = 1e3
    far.codebook.means[:, :5] = mixer.codebook.means
    far.load_state_dict({n: t for n, t in mixer.state_dict().items() if "codebook" not in n}, strict=False)
    same(far(x).y, y)


# Codebook


def test_the_codebook_moves_once_per_step_towards_its_keys() -> None:
    mixer, batches = ready(decay=0.9), [tokens(30, seed) for seed in (1, 2)]
    before = mixer.codebook.means.clone()
    expected = before.clone()
    keys = torch.cat([ORACLE.vectors(mixer, x)[1] for x in batches]).detach()
    for g in range(2):
        code = torch.tensor([[ORACLE.nearest(k, before[g]) for k in row] for row in keys[:, g]])
        for s in range(5):
            mine = keys[:, g][code == s]
            expected[g, s] += 0.1 * (mine - before[g, s]).sum(0) / (0.9 + 0.1 * len(mine))
    for x in batches:
        mixer(x).y.sum().backward()
        assert torch.equal(mixer.codebook.means, before)
    mixer.after_step()
    same(mixer.codebook.means, expected)
    mixer.after_step()  # nothing new: only the weight of the past fades
    same(mixer.codebook.means, expected)


def test_commitment_is_the_squared_distance_to_the_codes() -> None:
    mixer, x = ready(commitment=0.5), tokens(12)
    k = ORACLE.vectors(mixer, x)[1]
    distance = (k - ORACLE.quantised(mixer, k.detach())).square().sum((1, 3)).mean()
    loss = mixer(x).losses["commitment"]
    same(loss, 0.5 * distance)
    ours, theirs = (torch.autograd.grad(t, mixer.key.weight)[0] for t in (loss, 0.5 * distance))
    same(ours, theirs)
    assert mixer.eval()(x).losses == {}
    assert mixer.train()(x, Context(training=False)).losses == {}


def test_codes_start_as_wide_as_keys() -> None:
    torch.manual_seed(0)
    mixer = build("vq", 64, heads=2, codes=512)
    assert isinstance(mixer, VQ)
    k = ORACLE.vectors(mixer.double(), torch.randn(1, 100, 64, dtype=torch.float64))[1].detach()
    assert float(k.square().mean()) == pytest.approx(32**-0.5, rel=1e-3)
    assert float(mixer.codebook.means.square().mean()) == pytest.approx(32**-0.5, rel=0.05)


def test_statistics() -> None:
    mixer, x, seen = ready(), tokens(30), {}
    mixer.codebook.count[:, 0] = 0.5
    mixer(x, Context(statistics=seen))
    k = ORACLE.vectors(mixer, x)[1].detach()
    quantised = ORACLE.quantised(mixer, k)
    used, perplexity = [], []
    for g in range(2):
        code = [ORACLE.nearest(t, mixer.codebook.means[g]) for row in k[:, g] for t in row]
        share = torch.tensor([code.count(s) / len(code) for s in range(5)], dtype=torch.float64)
        used.append(float((share > 0).double().mean()))
        perplexity.append(float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum())))
    assert float(seen["used_codes"]) == pytest.approx(sum(used) / 2)
    assert float(seen["code_perplexity"]) == pytest.approx(sum(perplexity) / 2)
    assert float(seen["quantization_error"]) == pytest.approx(float((k - quantised).square().sum() / k.square().sum()))
    assert int(seen["dead_codes"]) == 2


# State


@torch.no_grad()
def test_a_state_is_of_constant_size() -> None:
    mixer, x = ready().eval(), tokens(64, rows=1)
    state, held = mixer.init_state(1), []
    for t in range(64):
        mixer(x[:, t : t + 1], None, state)
        held.append(state.bytes)
    assert held[-4:] == held[8:12] == held[28:32]
    assert state.capacity < 3 * max(held)


@torch.no_grad()
def test_what_codes_hold_leaves_with_the_document() -> None:
    """Carried and unused, or used and never reset: both have been seen. Here a row ends its document amid a block."""
    mixer, x = ready().eval(), tokens(60)
    state = mixer.init_state(2)
    mixer(x[:, :23], None, state)
    assert state.folded[0][0].sum() == 2 * 2 * 16
    positions = torch.stack([torch.arange(23, 60), torch.arange(37)])
    y = mixer(x[:, 23:], Context(positions=positions), state).y
    same(y[:1], mixer(x[:1]).y[:, 23:])
    same(y[1:], mixer(x[1:, 23:]).y)
    assert state.folded[0][0].sum((1, 2)).tolist() == [2 * 56, 2 * 32]


@pytest.mark.parametrize("limit", [3, 4, 7, 13])
@pytest.mark.parametrize("chunk", [1, 9, 60])
@torch.no_grad()
def test_a_limit_hides_tokens_and_then_what_codes_hold(limit: int, chunk: int) -> None:
    """Blocks of 4 tokens, a limit of M blocks: before the last two a query meets those of the last M to 2M, by code."""
    mixer, x = ready(positions="none").eval(), tokens(60)
    state = mixer.init_state(2, limit=limit)
    ours = torch.cat([mixer(part, None, state).y for part in x.split(chunk, 1)], 1)
    q, k, v = ORACLE.vectors(mixer, x)
    key, value = (t.repeat_interleave(2, 1) for t in (ORACLE.quantised(mixer, k), v))
    i, j = torch.arange(60)[:, None], torch.arange(60)[None]
    folded, span = i // 4 - 1, -(-limit // 4)  # blocks that are no longer met token by token, and M
    by_code = (j // 4 < folded) & (j // 4 >= span * (folded // span - 1))
    met = triangle(60) & (((i - j < limit) & (j // 4 >= folded)) | by_code)
    logits = ((q + mixer.content_bias) @ key.mT).masked_fill(~met, -torch.inf)
    same(ours, ORACLE.output(mixer, x, logits.softmax(-1) @ value))


@torch.no_grad()
def test_a_segment_amid_a_document_has_nothing_older() -> None:
    """Positions go on where no state does: blocks are drawn on them, and what came before is not known."""
    mixer, x = ready(positions="none", block=4), tokens(30)
    y = mixer(x[:, 6:], Context(positions=torch.arange(6, 30).expand(2, -1))).y
    assert y.isfinite().all()
    # What blocks 2 .. and on hold is complete; block 1 is not whole here, and is forgotten with its window.
    q, k, v = ORACLE.vectors(mixer, x)
    key, value = (t.repeat_interleave(2, 1) for t in (ORACLE.quantised(mixer, k), v))
    i, j = torch.arange(30)[:, None], torch.arange(30)[None]
    met = triangle(30) & (j >= 6) & ((j // 4 >= i // 4 - 1) | (j >= 8))
    logits = ((q + mixer.content_bias) @ key.mT).masked_fill(~met, -torch.inf)
    out = logits[:, :, 6:].softmax(-1) @ value
    same(y, ORACLE.output(mixer, x[:, 6:], out))


# Numbers and settings


def test_autocast_changes_no_code() -> None:
    torch.manual_seed(0)
    mixer, x = build("vq", 64, heads=4, codes=64, block=16), torch.randn(2, 100, 64)
    assert isinstance(mixer, VQ)
    mixer(x).y.sum().backward()
    exact = mixer.codebook.pending.clone()
    mixer.after_step(skipped=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x).y
        y.float().sum().backward()
    assert torch.equal(mixer.codebook.pending[..., -1], exact[..., -1])
    assert y.dtype == torch.bfloat16


def test_gated_is_the_papers_unit() -> None:
    mixer, x = ready(gated=True, heads=1, kv_heads=None, head_dim=6, positions="none", block=40), tokens(30)
    assert mixer.value.weight.shape == (2 * DIM, DIM)
    q, k, v = ORACLE.vectors(mixer, x)
    out = F.scaled_dot_product_attention(
        q + mixer.content_bias, ORACLE.quantised(mixer, k.detach()), v, is_causal=True, scale=1.0
    )
    same(mixer(x).y, (out[:, 0] * F.silu(x @ mixer.gate.weight.T)) @ mixer.output.weight.T)


def test_settings_that_do_not_fit() -> None:
    wrong = {"block": 0, "codes": 0, "decay": 1.0, "commitment": -1.0, "positions": "rope", "position_features": 1}
    found = dict(read_settings("vq", DIM, wrong)[1])
    assert found == {
        "block": "block must be >= 1, got 0",
        "codes": "codes must be >= 1, got 0",
        "decay": "decay must be < 1, got 1.0",
        "commitment": "commitment must be >= 0, got -1.0",
        "positions": "positions must be xl or none, got 'rope'",
        "position_features": "position_features must be >= 2, got 1",
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"heads": 4, "kv_heads": 3}, [("kv_heads", "kv_heads 3 does not divide heads 4; nearest: 2, 4")]),
        ({"heads": 3}, [("heads", "heads 3 does not divide dim 16; nearest: 2, 4 (or set head_dim)")]),
        (
            {"heads": 2, "head_dim": 5},
            [
                (
                    "position_features",
                    "position_features must be even, got 5, which is head_dim; set it, or positions none",
                )
            ],
        ),
        ({"position_features": 3}, [("position_features", "position_features must be even, got 3")]),
        (
            {"heads": 3, "head_dim": 4, "gated": True},
            [("value_dim", "heads 3 does not divide 2 dim = 32; set value_dim")],
        ),
        ({"heads": 2, "head_dim": 5, "positions": "none"}, []),
        ({"heads": 3, "head_dim": 4, "gated": True, "value_dim": 5}, []),
        ({"heads": 2, "head_dim": 5, "position_features": 2}, []),
    ],
)
def test_settings_that_clash(settings: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert read_settings("vq", DIM, settings)[1] == expected
    if not expected:
        assert build("vq", DIM, codes=3, block=2, **settings)(torch.randn(1, 9, DIM)).y.isfinite().all()
