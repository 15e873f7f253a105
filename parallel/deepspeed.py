"""ZeRO by DeepSpeed behind the interface of `parallel.engine`: what a rank holds is spread over all of them.

Stage 1 spreads the moments (and the master weights that they move), stage 2 the gradients too, stage 3 the weights too:
there a layer's weights come together while it computes. The update is that of `TorchEngine`: the same clipping, the
same guard, and a loss normalised by the scored labels of all ranks. DeepSpeed averages gradients over its ranks, of
which ours all are some, whether they share rows or slices of them; so each rank's share is multiplied by their number.

Weights stay float32 and matrix products run under autocast, as in `TorchEngine`, not in DeepSpeed's modes of 16 bits:
those round every parameter, routers and norms included.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020, arXiv 1910.02054).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.deepspeed_settings import deepspeed_settings
from parallel.engine import Accept, LossScale, MicroBatches, Result, StepInfo
from parallel.world import ALONE, LOOPBACK, World

MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ()}
"""What an optimizer remembers of each parameter, in the shape of it. Beside them AdamW counts its steps."""


class DeepSpeedEngine(MicroBatches):
    """Trains as `TorchEngine` does, with what each rank holds reduced by ZeRO `stage` 1, 2 or 3.

    optimizer: AdamW (or SGD without momentum) over the parameters of `model`, fresh. Parameters that got no gradient
    count as having got zeros: unlike in `TorchEngine` they decay. offload, extra: see `deepspeed_settings`. At stage 3
    the weights can be read within `reading` only.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        world: World = ALONE,
        device: torch.device,
        stage: int = 2,
        dtype: str = "float32",
        clip: float = 0.0,
        micro_batch: int = 1,
        offload: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        assert dtype in ("float32", "bfloat16"), "float16 has no loss scale here"
        settings = deepspeed_settings(
            stage=stage,
            clip=clip,
            micro_batch=micro_batch,
            offload=offload,
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            extra=extra,
        )
        super().__init__(model, device=device, dtype=dtype, world=world)
        self.stage = stage
        self._moments = MOMENTS[type(optimizer)]
        self._base = optimizer
        self._held = ExitStack()
        try:
            self._held.enter_context(_process_group(world, device))
            self._held.enter_context(_functions_kept())
            self._library = load_library()
            self._root = _Root(model)
            self._engine = self._library.initialize(model=self._root, optimizer=optimizer, config=settings)[0]
            self._held.callback(self._engine.destroy)
            self._held.callback(_forget_root, self._root)
            self._make_moments()
        except BaseException:
            self._held.close()
            raise

    def forward_loss(
        self, tokens: Tensor, labels: Tensor, ctx: Any, step_tokens: int, seed: int, state: Any = None
    ) -> Tensor:
        """This micro-batch's share of the step's loss, see `TorchEngine.forward_loss`; times the number of ranks."""
        loss = self._as_model.loss
        share = self._engine(lambda: self._share(loss, tokens, labels, ctx, step_tokens, seed, state))
        return share * self.world.size

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to the step's. A loss that is not finite makes them so, whatever they are."""
        guard = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
        self._engine.backward(loss * guard, scale_wrt_gas=False)

    def step(self, lr: float, accept: Accept | None = None) -> StepInfo:
        """Sum over the ranks, clip, update, clear; or skip the update if anything is not finite."""
        assert accept is None, "the norm of the gradient is known only behind the update"
        numbers = torch.stack([self._loss_sum, self._auxiliary])
        self.world.sum_([numbers])
        loss, auxiliary = numbers.tolist()
        for group in self._base.param_groups:
            group["lr"] = lr
        self._engine.step()
        skipped = bool(self._engine.optimizer.overflow)
        if not skipped:
            self.world.sum_(self._as_model.pending())
        self._as_model.after_step(skipped=skipped)
        self._reset()
        return StepInfo(loss, auxiliary, float(self._engine.get_global_grad_norm()), lr, skipped)

    def reading(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns. Weights that are in parts come together layer by layer, as in training."""
        done: list[Result] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done.append(work())
            except BaseException as error:  # told behind the hooks that put the weights away
                failed.append(error)

        with torch.no_grad():
            self._root(run)
        if failed:
            raise failed[0]
        return done[0]

    @torch.no_grad()
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that training changes, in the form of `TorchEngine.state`, on the first rank; nothing elsewhere.

        One parameter at a time comes together, so no rank but the first ever holds more than one whole.
        """
        whole: dict[Tensor, Tensor] = {}
        for parameter in self.model.parameters():
            with self._gathered(parameter):
                whole[parameter] = _copy(parameter) if self.world.is_first else parameter
        entries = self.model.state_dict(keep_vars=True)
        model = {name: whole[tensor] if tensor in whole else _copy(tensor) for name, tensor in entries.items()}
        optimizer: dict[str, Tensor] = {}
        steps = self._steps
        for name, parameter in self._trained.items():
            if steps is not None:
                optimizer[f"step.{name}"] = _copy(steps)
            for key in self._moments:
                moment = self._library.utils.safe_get_full_optimizer_state(parameter, key)
                if self.world.is_first:
                    optimizer[f"{key}.{name}"] = _copy(moment)
        optimizer[LossScale.NAME] = LossScale(1.0).tensor()
        return {"model": model, "optimizer": optimizer} if self.world.is_first else {"model": {}, "optimizer": {}}

    @torch.no_grad()
    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `state` of any engine returned; each rank is given the whole.

        ValueError, on all ranks and before anything changes, that names what is missing, unexpected or of another
        shape. Of steps that differ between parameters the largest counts for all.
        """
        self._check_state(state)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            value = state["model"][name]
            if isinstance(tensor, nn.Parameter):
                self._set_weights(tensor, value)
            else:
                tensor.copy_(value)
        for name, parameter in self._trained.items():
            for key in self._moments:
                self._set_moment(parameter, key, state["optimizer"][f"{key}.{name}"])
        if self._steps is not None:
            last = max(float(state["optimizer"][f"step.{name}"]) for name in self._trained)
            for flat in self._flats:
                self._base.state[flat]["step"].fill_(last)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, and leave the group of one process if there is one."""
        self._held.close()

    @cached_property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def _flats(self) -> list[Tensor]:
        """This rank's parts of the master weights: what the optimizer moves."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    @property
    def _steps(self) -> Tensor | None:
        """How many updates the optimizer has made, if it counts them."""
        return self._base.state[self._flats[0]].get("step")

    def _make_moments(self) -> None:
        """The optimizer's state, as zeros, so that it is whole before the first update, too."""
        for flat in self._flats:
            step = {"step": torch.zeros((), device=flat.device)} if self._moments else {}
            self._base.state[flat] = {**step, **{key: torch.zeros_like(flat) for key in self._moments}}
        if self.stage < 3:
            from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

            zero = self._engine.optimizer
            for parameters, flat in zip(zero.bit16_groups, self._flats, strict=True):
                link(parameters, flat, self._base.state)

    def _gathered(self, parameter: nn.Parameter, modifier: int | None = None) -> AbstractContextManager[Any]:
        """The whole parameter at hand; what the rank `modifier` writes into it holds for all."""
        return self._library.zero.GatheredParameters([parameter], modifier_rank=modifier, enabled=self.stage == 3)

    def _set_weights(self, parameter: nn.Parameter, value: Tensor) -> None:
        with self._gathered(parameter, modifier=0):
            parameter.data.copy_(value)
        if not parameter.requires_grad:
            return
        if self.stage == 3:
            self._library.utils.safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
        else:
            self._library.utils.safe_set_full_fp32_param(parameter, value)

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 3:
            self._library.utils.safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)
        else:
            self._library.utils.safe_set_full_optimizer_state(parameter, value, key)

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of `value`: the ranks' parts are of one size, zeros fill the last.

        DeepSpeed's own setter of whole tensors at stage 3 knows nothing of the filling, and fails where there is any.
        """
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        filled = value.new_zeros(size * self.world.size)
        filled[: value.numel()] = value.flatten()
        return filled[size * self.world.rank :][:size].to(self.device)

    def _check_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        shapes = {p: getattr(p, "ds_shape", p.shape) for p in self.model.parameters()}
        model = {name: shapes.get(x, x.shape) for name, x in self.model.state_dict(keep_vars=True).items()}
        moments = {f"{key}.{name}": shapes[p] for name, p in self._trained.items() for key in self._moments}
        if self._steps is not None:
            moments |= {f"step.{name}": torch.Size() for name in self._trained}
        problems = _misfits(model, state["model"]) + _misfits(
            moments, {name: x for name, x in state["optimizer"].items() if name != LossScale.NAME}
        )
        told = next(filter(None, self.world.gather(problems)), None)
        if told:
            raise ValueError(f"the checkpoint belongs to another model: {'; '.join(told)}")


class _Root(nn.Module):
    """What DeepSpeed hooks: it runs any work on the model as its forward pass, be it a loss or a whole evaluation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def _misfits(expected: Mapping[str, Any], found: Mapping[str, Tensor]) -> list[str]:
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    return problems + [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def load_library() -> Any:
    """DeepSpeed, quiet, and kept from compiling anything at start.

    To be called before the ranks join: its functions have the group of that moment as a default, and would keep it,
    with its threads, until Python ends.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Read when it first talks to other processes: without an entry here it compiles its own shared-memory collectives,
    # for minutes, and behind the lock of a compilation that was killed for ever.
    deepspeed.ops.__compatible_ops__ = {}
    # torch renames the collectives that it uses, and says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


@contextmanager
def _functions_kept() -> Iterator[None]:
    """Afterwards `torch.nn.functional.linear` is what it was: stage 3 puts another in its place for good."""
    linear = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = linear


@contextmanager
def _process_group(world: World, device: torch.device) -> Iterator[None]:
    """What DeepSpeed asks of its surroundings: a process group, of one process where nobody made one; and the five
    variables of a launcher."""
    variables: dict[str, Any] = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    variables |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": 0}  # looked for, but nobody calls there
    missing = {name: str(value) for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    alone = not dist.is_initialized()
    if alone:
        assert world.size == 1, "several ranks are joined by parallel.world.join"
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        _forget_groups(destroy=alone)
        for name in missing:
            del os.environ[name]


def _forget_root(root: nn.Module) -> None:
    """Stage 3 notes where its hooks are at work, and begins with a root that it never takes off."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not root]


def _forget_groups(destroy: bool) -> None:
    """DeepSpeed lets go of the groups that it made: in a module of its own they would outlive the world, with their
    threads, and be taken for those of the next one."""
    from deepspeed import comm
    from deepspeed.utils import groups

    if destroy:
        comm.destroy_process_group()
    else:
        groups._release_process_group_references()
