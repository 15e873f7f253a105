"""`attend`: values and gradients of every path against its definition, and that against a loop over queries."""

import math

import pytest
import torch

from attention.ops.attend import attend, attend_reference
from attention.ops.attend_visit import FoldVisit


def by_loop(q, k, v, life, *, time=None, key_bias=None, gate=None):
    """The last example, one query at a time over the keys it meets: straight from the definition, without masks."""
    (B, H, Nq, D), (G, Nk) = q.shape, k.shape[1:3]
    birth, death = life.birth.expand(B, G, Nk).tolist(), life.death.expand(B, G, Nk).tolist()
    time = (torch.arange(Nq) if time is None else time).expand(B, H, Nq).tolist()
    out, lse = [], []
    for h in range(H):
        g = h // (H // G)
        for i in range(Nq):
            lives = zip(birth[-1][g], death[-1][g])
            met = [j for j, (born, dead) in enumerate(lives) if born <= time[-1][h][i] < dead]
            logits = k[-1, g, met] @ q[-1, h, i] / math.sqrt(D)
            if key_bias is not None:
                logits = logits + key_bias.expand(B, G, Nk)[-1, g, met]
            weights = logits.exp()
            if gate is not None:
                above = gate[0][-1, g, met] - gate[1][-1, h, i]
                weights = weights * torch.where(above >= 1, 1.0, torch.where(above <= 0, 0.0, above))
            total = weights.sum()
            if total == 0:
                out.append(v[-1, g, :0].sum(0) + 0 * q[-1, h, i].sum())
                lse.append(v.new_tensor(-torch.inf))
            else:
                out.append(weights @ v[-1, g, met] / total)
                lse.append(total.log())
    return torch.stack(out).view(1, H, Nq, -1), torch.stack(lse).view(1, H, Nq)


def last_example(*args, **settings):
    out, lse = attend_reference(*args, **settings)
    return out[-1:], lse[-1:]


def gradients(case, function, **settings):
    """(out, lse, gradients of all leaves) for a fixed random direction, lse included where it is finite."""
    generator = torch.Generator().manual_seed(1)
    for leaf in case.leaves:
        leaf.requires_grad_()
    out, lse = case.call(function, **settings)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    lse_direction = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    score = (out * direction).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * lse_direction).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(score, case.leaves, materialize_grads=True)


def assert_equal(case, ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-12)
    for mine, other in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_reference_follows_the_definition(drawn):
    assert_equal(drawn, gradients(drawn, last_example), gradients(drawn, by_loop))


def test_torch_follows_the_reference(drawn):
    assert_equal(drawn, gradients(drawn, attend), gradients(drawn, attend_reference))


@pytest.mark.usefixtures("small_parts")
def test_tile_loop_in_parts(drawn):
    assert_equal(drawn, gradients(drawn, attend), gradients(drawn, attend_reference))


@pytest.mark.usefixtures("small_parts", "no_fused_kernel")
def test_without_the_fused_kernel(drawn):
    assert_equal(drawn, gradients(drawn, attend), gradients(drawn, attend_reference))


@pytest.mark.usefixtures("small_parts")
def test_folded_tiles(drawn_long, monkeypatch):
    visited, keys = [], FoldVisit.keys
    monkeypatch.setattr(FoldVisit, "keys", lambda self, t: visited.append(self.tile.count) or keys(self, t))
    assert_equal(drawn_long, gradients(drawn_long, attend), gradients(drawn_long, attend_reference))
    assert max(visited) > 3
