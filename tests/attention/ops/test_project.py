"""Projections of chosen tokens against loops over their lists, and against those of all tokens, masked."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention.ops import project
from attention.ops.project import gather_project, scatter_project
from attention.ops.select import listed
from lmtrain.bench.measure import largest_bytes

B, T, H, D, M = 2, 20, 3, 7, 4  # M: width of a head


@pytest.fixture(params=[1, 2, 4, 6, "padded"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many lists' tokens exist together: of a row, of all rows, of some heads or all; and not knowing of ends."""
    if request.param == "padded":
        monkeypatch.setattr(project, "_used_places", lambda nobody: [[nobody.shape[2]] * H] * B)
    else:
        monkeypatch.setattr(project, "AT_ONCE", request.param * lists().shape[2] * D)


def some(share: float = 0.4) -> Tensor:
    """[B, H, T], of unequal numbers, in one list none."""
    chosen = torch.rand(B, H, T, generator=torch.Generator().manual_seed(0)) < share
    chosen[0, 1] = False
    return chosen


def lists() -> Tensor:
    """[B, H, n] of random tokens."""
    return listed(some())


CHOICES = {
    "some": some,
    "a head without tokens": lambda: some() & (torch.arange(H) != 1)[:, None],
    "a head with all": lambda: some() | (torch.arange(H) == 2)[:, None],
    "all": lambda: torch.ones(B, H, T, dtype=torch.bool),
    "one token": lambda: (torch.arange(T) == 6).expand(B, H, T),
    "nobody": lambda: torch.zeros(B, H, T, dtype=torch.bool),
}
each_choice = pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES.keys())


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def gathered_by_loops(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    nobody = x.new_zeros(weight.shape[2])
    return torch.stack(
        [
            torch.stack(
                [torch.stack([x[b, t] @ weight[h] if t >= 0 else nobody for t in index[b, h]]) for h in range(H)]
            )
            for b in range(B)
        ]
    )


def scattered_by_loops(y: Tensor, index: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    rows = [[y.new_zeros(weight.shape[2]) for _ in range(T)] for _ in range(B)]
    for b in range(B):
        for h in range(H):
            for place, t in enumerate(index[b, h].tolist()):
                if t >= 0:
                    rows[b][t] = rows[b][t] + gate[b, h, place] * y[b, h, place] @ weight[h]
    return torch.stack([torch.stack(row) for row in rows])


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gathered(at_once: None) -> None:
    index, (x, weight) = lists(), leaves((B, T, D), (H, D, M))
    assert_same(gather_project(x, index, weight), gathered_by_loops(x, index, weight), [x, weight])


def test_scattered(at_once: None) -> None:
    index = lists()
    y, gate, weight = inputs = leaves((B, H, index.shape[2], M), (B, H, index.shape[2]), (H, M, D))
    assert_same(scatter_project(y, index, gate, weight, T), scattered_by_loops(y, index, gate, weight), inputs)


@each_choice
def test_a_list_is_projected_as_all_tokens_are(choose: Callable[[], Tensor], at_once: None) -> None:
    chosen, (x, weight) = choose(), leaves((B, T, D), (H, D, M))
    index = listed(chosen)
    out = gather_project(x, index, weight)
    everyone = torch.einsum("btd,hdm->bhtm", x, weight)
    assert not out[index < 0].any()
    assert_same(out[index >= 0], everyone[chosen], [x, weight])


@each_choice
def test_back_at_their_tokens_the_heads_are_summed(choose: Callable[[], Tensor], at_once: None) -> None:
    """Whatever stands behind the end of a list, in values or gates, even if it is no number: in gradients, too."""
    chosen, (y, gate, weight) = choose(), leaves((B, H, T, M), (B, H, T), (H, M, D))
    index = listed(chosen)
    place, nobody = index.clamp(min=0), index < 0
    spoilt, gates = (t.detach().take_along_dim(i, 2) for t, i in ((y, place[..., None]), (gate, place)))
    spoilt.masked_fill_(nobody[..., None], torch.nan).requires_grad_()
    gates.masked_fill_(nobody, torch.inf).requires_grad_()
    out = scatter_project(spoilt, index, gates, weight, T)
    expected = torch.einsum("bhtm,hmd->btd", (y * gate[..., None]) * chosen[..., None], weight)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), [spoilt, gates, weight])
    theirs = torch.autograd.grad((expected * weights).sum(), [y, gate, weight])
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert not a[nobody].any()
        torch.testing.assert_close(a[~nobody], b[chosen], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("nobody", [0, 2, 7])
def test_nobody_may_stand_anywhere(nobody: int) -> None:
    index = torch.arange(8).expand(B, H, 8).clone()
    index[:, :, nobody] = -1
    y, gate, weight = inputs = leaves((B, H, 8, M), (B, H, 8), (H, M, D))
    assert_same(scatter_project(y, index, gate, weight, T), scattered_by_loops(y, index, gate, weight), inputs)


def test_nobody_takes_and_gives_nothing() -> None:
    """Whatever stands in the padding, even if it is no number."""
    index = lists()
    y, gate, weight = leaves((B, H, index.shape[2], M), (B, H, index.shape[2]), (H, M, D))
    out = scatter_project(y, index, gate, weight, T)
    spoilt = y.detach().masked_fill((index < 0)[..., None], torch.nan)
    assert torch.equal(scatter_project(spoilt, index, gate, weight, T), out)
    x, weight = leaves((B, T, D), (H, D, M))
    assert not gather_project(x, index, weight)[index < 0].any()


@pytest.mark.parametrize("places", [0, 3], ids=["no places", "nobody in them"])
def test_empty_lists(places: int) -> None:
    index = torch.full((B, H, places), -1)
    x, weight, y, back = leaves((B, T, D), (H, D, M), (B, H, places, M), (H, M, D))
    out = scatter_project(gather_project(x, index, weight) + y, index, torch.ones(B, H, places), back, T)
    assert out.shape == (B, T, D)
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), [x, weight, y, back]))


def test_the_same_again_is_bit_equal() -> None:
    """Tokens that many heads chose are summed in one order."""
    chosen = torch.rand(2, 40, 300) < 0.5
    index = listed(chosen)
    x, w_in, w_out = torch.randn(2, 300, 16), torch.randn(40, 16, 8), torch.randn(40, 8, 16)
    gate = torch.rand(index.shape)

    def once() -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, w_in, w_out, gate)]
        mine, first, second, gates = inputs
        y = scatter_project(gather_project(mine, index, first), index, gates, second, 300)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_many_heads_are_summed_in_float32() -> None:
    """In bfloat16 256 + 1 is 256."""
    heads = 512
    index = torch.zeros(1, heads, 1, dtype=torch.int64)
    ones = torch.ones(1, heads, 1, 1, dtype=torch.bfloat16)
    y = scatter_project(ones, index, torch.ones(1, heads, 1), ones[0], 1)
    assert y.dtype == torch.bfloat16
    assert y.item() == heads


def test_autocast_rounds_as_a_linear_layer_does() -> None:
    index = lists()
    x, weight = (t.detach().float().requires_grad_() for t in leaves((B, T, D), (H, D, M)))
    with torch.autocast("cpu", torch.bfloat16):
        out = gather_project(x, index, weight)
        y = scatter_project(out, index, torch.rand(index.shape), weight.mT, T)
    assert out.dtype == y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), [x, weight])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_the_tokens_of_all_heads_never_exist_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "AT_ONCE", 2**16)
    heads, places, dim, width = 64, 100, 256, 4
    index = torch.arange(places).expand(1, heads, -1)
    x, weight, y = torch.randn(1, places, dim), torch.randn(heads, dim, width), torch.randn(1, heads, places, width)
    calls = (
        lambda: project._gather_project(x, index, weight),
        lambda: project._scatter_project(y, index, weight.mT, places, torch.rand(index.shape)),
        lambda: project._gather_outer(x, index, y),
    )
    for call in calls:
        assert places * dim <= largest_bytes(call) // 4 <= 2**17 < heads * places * dim


def test_flops_count_the_chosen_only() -> None:
    index = lists()
    chosen = int((index >= 0).sum())
    x, weight, y, back = leaves((B, T, D), (H, D, M), (B, H, index.shape[2], M), (H, M, D))
    with FlopCounterMode(display=False) as counter:
        gathered = gather_project(x, index, weight)
        assert counter.get_total_flops() == 2 * D * M * chosen
        scatter_project(y + gathered, index, torch.ones(index.shape), back, T).sum().backward()
    assert counter.get_total_flops() == 6 * 2 * D * M * chosen


def test_the_operators_are_what_they_say() -> None:
    index, (x, weight, back) = lists(), leaves((B, T, D), (H, D, M), (H, M, D))
    x, weight, back = x.detach(), weight.detach(), back.detach()
    y = torch.randn(*index.shape, M, dtype=torch.float64)
    operators = torch.ops.attention
    for operator, args in (
        (operators.gather_project, (x, index, weight)),
        (operators.scatter_project, (y, index, back, T)),
        (operators.scatter_project, (y, index, back, T, torch.rand(index.shape))),
        (operators.gather_outer, (x, index, y)),
        (operators.gather_outer, (x, index, y, torch.rand(index.shape))),
    ):
        torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.zeros(B, H, 2)}, "index: expected int64"),
        ({"x": torch.zeros(B, T, D + 1)}, r"x: expected shape \[2, tokens, 7\], got \(2, 20, 8\)"),
        ({"x": torch.zeros(B + 1, T, D)}, r"x: expected shape \[2, tokens, 7\], got \(3, 20, 7\)"),
        ({"weight": torch.zeros(H + 1, D, M)}, r"weight: expected torch.float32 \[3, width, width\]"),
        ({"weight": torch.zeros(H, D, M, dtype=torch.float64)}, "weight: expected torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.zeros(B, T, D), "index": lists(), "weight": torch.zeros(H, D, M)}
    with pytest.raises(ValueError, match=message):
        gather_project(**(given | change))


def test_scattered_shapes_are_checked() -> None:
    index = lists()
    with pytest.raises(ValueError, match="y: expected shape"):
        scatter_project(torch.zeros(B, H, 1, M), index, torch.ones(index.shape), torch.zeros(H, M, D), T)


def test_scattered_gates_are_checked() -> None:
    index = lists()
    with pytest.raises(ValueError, match=r"gate: expected shape \(2, 3, \d+\) as index, got \(2, 3\)"):
        scatter_project(torch.zeros(*index.shape, M), index, torch.ones(B, H), torch.zeros(H, M, D), T)
