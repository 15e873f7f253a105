"""DeepSpeed's JSON, generated: nobody writes one. Pure functions; the library itself is not imported here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

OURS = {
    "optimizer": "optimizer.kind and its settings",
    "scheduler": "optimizer.schedule",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch_tokens",
    "gradient_clipping": "train.clip",
    "sequence_parallel_size": "parallel.sequence",
    "data_parallel_size": "the number of processes",
    "tensor_parallel": "nothing: ranks share rows or slices of rows, not matrices",
    "pipeline": "nothing: every rank has all layers",
    "compile": "train.compile, with parallel.engine torch",
    "activation_checkpointing": "train.activation_checkpointing",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_param.device": "parallel.offload",
}
"""Keys of DeepSpeed that a setting of ours decides, whether anything is generated for them or not."""


REDUCE_BUCKET = 500_000_000
"""Numbers in the buffer through which gradients travel, by default; there is room for all of them, used or not."""

LIVE_PARAMETERS = 1_000_000_000
"""Numbers of whole weights that a rank holds at a time at stage 3, by default, if there are so many."""


def deepspeed_settings(
    *,
    stage: int,
    clip: float,
    micro_batch: int = 1,
    offload: bool = False,
    parameters: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    stage: of ZeRO, 1 to 3. clip: largest gradient norm, 0 = off. micro_batch: rows of one forward pass. offload:
    optimizer state, at stage 3 weights too, live in the memory of the CPU. parameters: numbers in all
    weights, which bound the buffer of gradients. extra: settings of DeepSpeed that are added as they are; ValueError
    names each one that is decided elsewhere.

    Always set, because the default is another or changes: clipping (1.0 in places), the dtype of accumulation (that of
    the model), that `step` and nothing else ends an accumulation (a count of micro-batches), and that the optimizer is
    the one handed over (with offload one of DeepSpeed's, compiled at start, is demanded).
    """
    assert stage in (1, 2, 3), "stage 0 reports no gradient norm, and the torch engine does the same"
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": float(clip),
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    extra = extra or {}
    if problems := conflicts(settings, extra):
        raise ValueError("; ".join(f"{key} {message}" for key, message in problems))
    if parameters is not None:
        zero["reduce_bucket_size"] = min(REDUCE_BUCKET, parameters)
    return _merged(settings, extra)


def conflicts(settings: Mapping[str, Any], extra: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, why not) of every key of `extra` that is not its to set."""
    generated = dict(_leaves(settings))
    found = []
    for key, _ in _leaves(extra):
        above = [key[:at] for at, letter in enumerate(key) if letter == "."]
        decider = next((OURS[name] for name in (*above, key) if name in OURS), None)
        if decider is not None:
            found.append((key, f"is decided by {decider}"))
        elif key in generated:
            found.append((key, f"is generated, as {generated[key]!r}"))
        elif any(name in generated for name in above) or any(name.startswith(f"{key}.") for name in generated):
            found.append((key, "does not have the form of what is generated for it"))
    return found


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is not a mapping."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _merged(settings: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in extra.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
