"""Points 1 and 7: a mixer is its definition, gradients included; in its limit it is multi-head attention."""

import pytest
import torch
from torch import Tensor

from tests.conformance.oracle import Subject, multi_head_attention
from tests.conformance.sequences import Tokens, largest_difference


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a random linear function of y; zero where y does not depend on an input."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    found = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("length", [1, 3, 17, 70])
def test_equals_its_definition(subject: Subject, length: int) -> None:
    mixer = subject.mixer()
    tokens = Tokens.random(2, length, subject.case.dim)
    tokens.vectors.requires_grad_()
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    inputs = [tokens.vectors, *parameters]

    y = tokens.run(mixer)
    expected = subject.oracle.definition(mixer, tokens.x, tokens.ctx())

    assert largest_difference(y, expected) < 1e-10
    for name, ours, theirs in zip(["input", *names], gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert largest_difference(ours, theirs) < 1e-10 * max(1.0, float(theirs.abs().max())), name


def test_dense_limit(typical: Subject) -> None:
    length, dim = 33, typical.case.dim
    limit = Subject(typical.kind, type(typical.case)(typical.oracle.dense_limit(dim, length), dim))
    mixer = limit.mixer()
    getattr(typical.oracle, "to_dense_limit", lambda mixer: None)(mixer)
    dense = getattr(typical.oracle, "dense", multi_head_attention)
    for shorter in (1, length - 1, length):
        tokens = Tokens.random(2, shorter, dim)
        assert largest_difference(tokens.run(mixer), dense(mixer, tokens.x, tokens.ctx())) < 1e-10
