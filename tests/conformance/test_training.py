"""Points 8 and 10: activation checkpointing, what is learnt online, saving, 16 bits, repetition."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmtrain.config import ModelConfig
from lmtrain.model import DecoderLM
from tests.conformance.oracle import Subject
from tests.conformance.sequences import Tokens


def make_model(subject: Subject, checkpointing: bool = False) -> DecoderLM:
    """Two layers in float64, always with the same weights."""
    torch.manual_seed(3)
    mixers = {"it": {"kind": subject.kind, **subject.case.settings}}
    config = ModelConfig(dim=subject.case.dim, layers=2, ffn_dim=32, vocab_size=11, mixers=mixers, pattern="it")
    model = DecoderLM(config).double()
    model.activation_checkpointing = checkpointing
    return model


def backward(model: DecoderLM, seed: int) -> None:
    """Forward and backward of one micro-batch."""
    tokens = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(seed))
    total, count, losses = model.loss(tokens[:, :-1], tokens[:, 1:])
    (total / count + sum(losses.values())).backward()


def saved(model: DecoderLM) -> dict[str, Tensor]:
    """A copy of what a checkpoint would hold."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def gradients(model: DecoderLM) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_activation_checkpointing_changes_nothing(typical: Subject) -> None:
    plain, recomputed = make_model(typical), make_model(typical, checkpointing=True)
    for model in (plain, recomputed):
        before = saved(model)
        backward(model, seed=1)
        backward(model, seed=2)
        assert_same(saved(model), before)
        model.after_step()
        if not list(model.buffers()):
            assert_same(saved(model), before)
    assert gradients(plain)
    assert_same(gradients(recomputed), gradients(plain))
    assert_same(saved(recomputed), saved(plain))


def test_a_skipped_step_leaves_no_trace(typical: Subject) -> None:
    skipping, other = make_model(typical), make_model(typical)
    before = saved(skipping)
    backward(skipping, seed=1)
    skipping.after_step(skipped=True)
    assert_same(saved(skipping), before)
    for model in (skipping, other):
        backward(model, seed=2)
        model.after_step()
    assert_same(saved(skipping), saved(other))


def test_evaluation_teaches_nothing(typical: Subject) -> None:
    evaluated, idle = make_model(typical), make_model(typical)
    with torch.no_grad():
        evaluated.eval()(torch.randint(11, (2, 20)))
    for model in (evaluated, idle):
        model.after_step()
    assert_same(saved(evaluated), saved(idle))


def test_saved_and_loaded_is_the_same_mixer(subject: Subject, tmp_path: Path) -> None:
    mixer, other = subject.mixer(), subject.mixer(seed=1)
    tokens = Tokens.random(2, 20, subject.case.dim)
    assert not torch.equal(tokens.run(other), tokens.run(mixer))
    save_file(
        {name: value.contiguous() for name, value in mixer.state_dict().items()},
        tmp_path / "mixer.safetensors",
    )
    other.load_state_dict(load_file(tmp_path / "mixer.safetensors"))
    assert torch.equal(tokens.run(other), tokens.run(mixer))


def test_the_same_again_is_bit_equal(subject: Subject) -> None:
    def once() -> list[Tensor]:
        mixer = subject.mixer(torch.float32)
        y = Tokens.random(2, 33, subject.case.dim).to(torch.float32).run(mixer)
        y.square().sum().backward()
        return [y, *(p.grad for p in mixer.parameters() if p.grad is not None)]

    first, second = once(), once()
    assert len(first) > 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bfloat16_is_near_float32(subject: Subject) -> None:
    """Under autocast y is off by at most 2^-6 of its norm, as if eight roundings (input, weights, q, k, ..)
    of at most 2^-9 each went in one direction. What decides (scores, thresholds, norms) stays float32."""
    mixer = subject.fresh(torch.float32)
    tokens = Tokens.random(4, 33, subject.case.dim).to(torch.float32)
    exact = tokens.run(mixer)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tokens.run(mixer)
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < error < 2**-6, float(error)
    rounded.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.grad is not None)
