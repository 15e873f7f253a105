"""The engine: how one optimizer step is computed. The trainer above it never touches gradients.

An engine works on any model with `loss(tokens, labels, ctx, state) -> (sum of nats, count, auxiliary losses)`,
`pending()` and `after_step(skipped)`, and any optimizer with `step(lr)`, `zero_grad()`, `state()` and
`load_state(...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from parallel.world import ALONE, World

Result = TypeVar("Result")
Loss = Callable[[Tensor, Tensor, Any, Any], tuple[Tensor, Tensor, dict[str, Tensor]]]
Accept = Callable[[float, float], bool]
"""(loss, gradient norm) of a step, both finite -> whether to make its update. All ranks ask, and answer alike."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StepInfo:
    """What one step did: loss in nats per token over the global batch (without auxiliary losses), their sum, the
    gradient norm before clipping, the learning rate, and whether the update was skipped. The same on all ranks."""

    loss: float
    auxiliary: float
    grad_norm: float
    lr: float
    skipped: bool


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Matrix products in `dtype`; float32 as it is."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Model(Protocol):
    """What an engine needs of a model, besides being a module."""

    def loss(
        self, tokens: Tensor, labels: Tensor, ctx: Any, state: Any
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...
    def pending(self) -> list[Tensor]:
        """Sums over what this rank read in the step, from which `after_step` learns: to be added up over the ranks."""

    def after_step(self, skipped: bool = False) -> None: ...


class Optimizer(Protocol):
    """What an engine needs of an optimizer."""

    def step(self, lr: float) -> None: ...
    def zero_grad(self) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Engine(Protocol):
    """How a step is computed, whatever the number of processes.

    All ranks call every method, in the same order: each may wait for the others. A step is, on each rank,
    `forward_loss` and `backward` for each of its micro-batches, as many on all ranks, then `step`.
    """

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes, for training and evaluation alike."""

    def forward_loss(
        self, tokens: Tensor, labels: Tensor, ctx: Any, step_tokens: int, seed: int, state: Any = None
    ) -> Tensor:
        """This micro-batch's share of the step's loss, see `TorchEngine.forward_loss`."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of what `forward_loss` returned to the step's."""

    def step(self, lr: float, accept: Accept | None = None) -> StepInfo:
        """Update the weights by the gradients of all ranks, or skip the update on all of them; clear the gradients.

        Skipped is what is not finite, or not accepted, by an engine that can ask before it updates (`TorchEngine`).
        """

    def reading(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns, which may call the model outside of training: to evaluate, to generate.

        On all ranks it must make the same forward passes in the same order, on whatever tokens.
        """

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that training changes, by name: `model` (parameters and buffers) and `optimizer`.

        In the same form whatever the engine and the number of ranks; whole on the first rank, which alone needs it.
        """

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `state` returned; each rank is given the whole. ValueError, on all, if it does not fit."""

    def close(self) -> None:
        """Release what the engine holds beside model and optimizer."""


class LossScale:
    """Keeps float16 gradients above underflow: halved after an overflow, doubled after 2,000 good steps."""

    NAME = "loss_scale"
    PATIENCE = 2000

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Learn from one step."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps % self.PATIENCE == 0:
            self.scale *= 2

    def tensor(self) -> Tensor:
        """What a checkpoint keeps: [scale, good steps], float64."""
        return torch.tensor([self.scale, self.good_steps], dtype=torch.float64)

    def load(self, kept: Tensor) -> None:
        """Take over what `tensor` returned."""
        self.scale, self.good_steps = float(kept[0]), int(kept[1])


class MicroBatches:
    """What engines have in common: the precision and the loss of a micro-batch, and the sums of them in a step."""

    def __init__(self, model: nn.Module, *, device: torch.device, dtype: str, world: World) -> None:
        self.world = world
        self.model = model
        self.device = device
        self.dtype = DTYPES[dtype]
        self._as_model = cast(Model, model)
        # torch.manual_seed would seed every device, and format a traceback for those that are not there.
        cuda = device.type == "cuda"
        self._generator = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
        self._reset()

    def _reset(self) -> None:
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._auxiliary = torch.zeros((), dtype=torch.float64, device=self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes, for training and evaluation alike."""
        return autocast(self.device, self.dtype)

    def _share(
        self, loss_of: Loss, tokens: Tensor, labels: Tensor, ctx: Any, step_tokens: int, seed: int, state: Any
    ) -> Tensor:
        """What `TorchEngine.forward_loss` describes, by `loss_of`, the model's loss."""
        self._generator.manual_seed(seed)
        with self.autocast():
            total, count, auxiliary = loss_of(tokens.to(self.device), labels.to(self.device), ctx, state)
        loss = total / max(step_tokens, 1)
        self._loss_sum += loss.detach()
        if auxiliary:
            added = sum(auxiliary.values()) * (count / max(step_tokens, 1))
            self._auxiliary += added.detach()
            loss = loss + added
        return loss


class TorchEngine(MicroBatches):
    """Plain torch: float32 weights, autocast to `dtype`, clipping, and a guard against non-finite steps.

    Each rank of the `world` holds all weights. Gradients are summed over the ranks once per step, so all of them make
    the same update, bit for bit. A step whose loss or gradient norm is not finite, be it on one rank only, leaves
    weights and moments as they were, bit for bit, on all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        device: torch.device,
        dtype: str = "float32",
        clip: float = 0.0,
        compile: bool = False,
        world: World = ALONE,
    ) -> None:
        super().__init__(model, device=device, dtype=dtype, world=world)
        self.optimizer = optimizer
        self.clip = clip
        self._loss = torch.compile(self._as_model.loss) if compile else self._as_model.loss
        self._scale = LossScale(2.0**16 if self.dtype == torch.float16 else 1.0)
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def forward_loss(
        self, tokens: Tensor, labels: Tensor, ctx: Any, step_tokens: int, seed: int, state: Any = None
    ) -> Tensor:
        """This micro-batch's share of the step's loss: sum of nats / `step_tokens` + auxiliary losses.

        tokens, labels: int64 [b, T]; step_tokens: scored labels of the whole step, over all micro-batches and
        ranks. Auxiliary losses are weighted by the micro-batch's share of them. `seed` is that of dropout;
        `state`, of the model, is what the rows have read before, and goes on with them.
        """
        return self._share(self._loss, tokens, labels, ctx, step_tokens, seed, state)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to the step's."""
        (loss if self._scale.scale == 1.0 else loss * self._scale.scale).backward()

    def step(self, lr: float, accept: Accept | None = None) -> StepInfo:
        """Sum over the ranks, clip, update, clear; or skip the update if anything is not finite, or not accepted."""
        self._sum_over_ranks()
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if self._scale.scale != 1.0:
            torch._foreach_mul_(grads, 1.0 / self._scale.scale)
        norm = nn.utils.get_total_norm(grads)
        loss, auxiliary, grad_norm = torch.stack([self._loss_sum, self._auxiliary, norm.double()]).tolist()
        finite = all(abs(number) < float("inf") for number in (loss, auxiliary, grad_norm))
        updates = finite and (accept is None or accept(loss, grad_norm))
        if updates:
            if self.clip:
                nn.utils.clip_grads_with_norm_(self._parameters, self.clip, norm)
            self.optimizer.step(lr)
        if self.dtype == torch.float16:
            self._scale.update(finite)
        self.optimizer.zero_grad()
        if updates:
            self.world.sum_(self._as_model.pending())
        self._as_model.after_step(skipped=not updates)
        self._reset()
        return StepInfo(loss, auxiliary, grad_norm, lr, not updates)

    def _sum_over_ranks(self) -> None:
        """Losses and gradients of all ranks in the place of those of this one.

        A gradient that a parameter has on some ranks only is zero on the others; a parameter that has none on any keeps
        none, as in one process: the optimizer leaves it alone.
        """
        if self.world.size == 1:
            return
        has_grad = torch.tensor([p.grad is not None for p in self._parameters], device=self.device)
        numbers = torch.cat([torch.stack([self._loss_sum, self._auxiliary]), has_grad.double()])
        self.world.sum_([numbers])
        self._loss_sum, self._auxiliary = numbers[0], numbers[1]
        grads = []
        for parameter, ranks in zip(self._parameters, numbers[2:].tolist(), strict=True):
            if ranks:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                grads.append(parameter.grad)
        self.world.sum_(grads)

    def reading(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns: the weights lie ready."""
        return work()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that training changes, by name: `model` (parameters and buffers) and `optimizer`."""
        optimizer = {**self.optimizer.state(), LossScale.NAME: self._scale.tensor()}
        return {"model": dict(self.model.state_dict()), "optimizer": optimizer}

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `state` returned; ValueError names what is missing, unexpected or of another shape."""
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"the checkpoint belongs to another model: {error}") from None
        optimizer = dict(state["optimizer"])
        self._scale.load(optimizer.pop(LossScale.NAME))
        self.optimizer.load_state(optimizer)

    def close(self) -> None:
        """Nothing to release."""
