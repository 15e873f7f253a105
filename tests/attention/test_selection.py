"""What mixers that choose by content share: no wait for the device but where it must be, and no length too short."""

from typing import Any

import pytest
import torch

from attention.mixer import Context, Mixer, build
from lmtrain.bench.measure import largest_bytes
from tests.attention.waits import Waits

DIM = 16
PACKED = torch.cat([torch.arange(30), torch.arange(10)]).expand(2, -1)
KINDS: dict[str, dict[str, Any]] = {
    "mosa": {"heads": 3, "head_dim": 4, "keep": 5},
    "routing": {"heads": 2, "clusters": 3, "window": 4},
    "moh": {"heads": 6, "kv_heads": 2, "shared_heads": 2, "active_heads": 2, "head_dim": 4},
}
# Where lists of unequal length are made their longest has to be known.
NEEDED = {"mosa": 1, "routing": 0, "moh": 1}


def ready(kind: str, **settings: Any) -> Mixer:
    torch.manual_seed(0)
    return build(kind, DIM, **(KINDS[kind] | settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_a_training_step_waits_for_the_longest_list_only(
    kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, x = ready(kind), torch.randn(2, 40, DIM)
    context = Context(positions=PACKED) if packed else Context()
    with Waits(monkeypatch) as waits:
        output = mixer(x, context)
        (output.y.sum() + sum(output.losses.values())).backward()
    assert sum(waits.calls.values()) == NEEDED[kind], dict(waits.calls)


def test_waits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([1.0, 0.0])
    with Waits(monkeypatch) as waits:
        x[x > 0]
        x.nonzero()
        x.tolist()
        int(x[0])
        bool(x[0])
    assert sum(waits.calls.values()) == 5


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("kind", ["mosa", "routing"])
@pytest.mark.parametrize("selection", ["strict", "paper"])
def test_no_sequence_is_too_short(kind: str, selection: str, length: int) -> None:
    """Shorter than what is kept, than the window, than there are clusters: trained on all the same."""
    large = {"mosa": {"keep": 64}, "routing": {"clusters": 16, "window": 64}}
    mixer, x = ready(kind, selection=selection, **large[kind]), torch.randn(2, length, DIM)
    output = mixer(x)
    assert output.y.shape == x.shape
    (output.y.square().sum() + sum(output.losses.values())).backward()
    assert output.y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    mixer.after_step()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_all_heads_may_serve_a_single_token(length: int) -> None:
    mixer, x = ready("moh"), torch.randn(2, length, DIM)
    output = mixer(x)
    (output.y.square().sum() + output.losses["balance"]).backward()
    assert output.y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_the_tokens_of_all_heads_of_mosa_never_exist_together() -> None:
    """With heads enough that they keep 8 of each token; a trained step holds nothing of heads x keep x dim."""
    length, keep, dim = 512, 32, 512
    heads = 8 * length // keep
    mixer, x = build("mosa", dim, heads=heads, head_dim=4, keep=keep), torch.randn(1, length, dim, requires_grad=True)
    largest = largest_bytes(lambda: mixer(x).y.sum().backward()) // 4
    assert length * dim <= largest < heads * keep * dim
