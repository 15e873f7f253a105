"""AdamW or Muon behind one interface, with state by parameter name.

State goes by parameter name, not by a place in some group, so a checkpoint outlives a change of groups, of
engine and of world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lmtrain.config import OptimizerConfig

Named = list[tuple[str, nn.Parameter]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer of `config` over those parameters of `model` that require gradients.

    Kind "adamw": all to AdamW. Kind "muon": the hidden matrices to Muon, at its own momentum of 0.95 and with
    updates of AdamW's size, so that both share one learning rate; the rest to AdamW. Vectors do not decay,
    nor does a parameter with the attribute `no_weight_decay = True`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert all(p.dtype in (torch.float32, torch.float64) for _, p in named), "master weights are float32"
    matrices = hidden_matrices(model) if config.kind == "muon" else set()
    muon = [(name, p) for name, p in named if p in matrices]
    adamw = [(name, p) for name, p in named if p not in matrices]
    parts: list[torch.optim.Optimizer] = []
    if adamw:
        parts.append(_adamw(adamw, config))
    if muon:
        groups = _decay_groups(muon, config.weight_decay)
        parts.append(torch.optim.Muon(groups, config.lr, adjust_lr_fn="match_rms_adamw"))
    return Optimizer(parts)


def torch_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The same AdamW without any state: for an engine that makes it itself, of its part of the weights alone."""
    return _adamw([(name, p) for name, p in model.named_parameters() if p.requires_grad], config)


class Optimizer:
    """Optimizers that step together. Their state is there from the start, as zeros, so it is always whole."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        for part in parts:
            for _, parameter in _named_parameters(part):
                part.state[parameter] = _zero_state(part, parameter)

    def step(self, lr: float) -> None:
        """Updates every parameter that has a gradient."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The live tensors, not copies, by parameter name.

        AdamW: `step.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>`. Muon: `momentum_buffer.<name>`.
        """
        return {
            f"{key}.{name}": value
            for part in self.parts
            for name, parameter in _named_parameters(part)
            for key, value in part.state[parameter].items()
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copies `state` in.

        ValueError, before anything changes, that names all that is missing, unexpected or of another shape
        or dtype.
        """
        own = self.state()
        problems = [f"missing {key}" for key in own.keys() - state.keys()]
        problems += [f"unexpected {key}" for key in state.keys() - own.keys()]
        problems += [
            f"{key} is {_form(state[key])}, not {_form(own[key])}"
            for key in own.keys() & state.keys()
            if _form(state[key]) != _form(own[key])
        ]
        if problems:
            raise ValueError("optimizer state does not fit this model: " + "; ".join(sorted(problems)))
        for key, value in own.items():
            value.copy_(state[key])

    def summary(self) -> str:
        """One line per group: which optimizer, how many parameters, how much weight decay."""
        return "\n".join(
            f"{type(part).__name__}: {sum(p.numel() for p in group['params']):,} parameters in "
            f"{len(group['params'])} tensors, weight decay {group['weight_decay']:g}"
            for part in self.parts
            for group in part.param_groups
        )


def hidden_matrices(model: nn.Module) -> set[Tensor]:
    """The weights that Muon is for: those of linear layers from features to features.

    Not the head (the model's `head_weight`), nothing tied to an embedding, no router (`no_weight_decay`), and
    no parameter outside a linear layer: tables, stacks of matrices and coefficients per channel.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    plain = {weight for weight in linear - tables if not getattr(weight, "no_weight_decay", False)}
    return plain - {getattr(model, "head_weight", None)}


def _adamw(named: Named, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(_decay_groups(named, config.weight_decay), config.lr, config.betas, config.eps, fused=True)


def _decay_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for `torch.optim`: matrices and stacks of them decay, vectors and what asks not to do not."""
    decayed: Named = []
    kept: Named = []
    for name, p in named:
        decays = p.ndim >= 2 and not getattr(p, "no_weight_decay", False)
        (decayed if decays else kept).append((name, p))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _zero_state(part: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What `part` would otherwise make at its first step, under the names that it looks for."""
    if isinstance(part, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def _named_parameters(part: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in part.param_groups:
        yield from zip(group["param_names"], group["params"])


def _form(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
