"""What DeepSpeed is given, and what a user may add."""

from typing import Any

import pytest

from parallel.deepspeed_settings import OURS, REDUCE_BUCKET, deepspeed_settings


def test_the_whole_of_it() -> None:
    assert deepspeed_settings(stage=2, clip=1.5, micro_batch=4) == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.5,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def test_the_buffer_of_gradients_is_no_larger_than_they_are() -> None:
    def bucket(**how: Any) -> int:
        return deepspeed_settings(stage=2, clip=1, **how)["zero_optimization"]["reduce_bucket_size"]

    assert bucket(parameters=1000) == 1000
    assert bucket(parameters=10**10) == REDUCE_BUCKET
    assert bucket(parameters=1000, extra={"zero_optimization": {"reduce_bucket_size": 7}}) == 7


def test_no_clipping_is_said_and_not_left_out() -> None:
    assert deepspeed_settings(stage=1, clip=0)["gradient_clipping"] == 0.0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_are_offloaded_where_they_are_in_parts(stage: int) -> None:
    zero = deepspeed_settings(stage=stage, clip=1, offload=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert ("offload_param" in zero) == (stage == 3)


def test_additions_go_where_they_belong() -> None:
    extra = {"zero_optimization": {"overlap_comm": True, "offload_optimizer": {"pin_memory": True}}, "comms_logger": {}}
    settings = deepspeed_settings(stage=3, clip=1, offload=True, extra=extra)
    assert settings["zero_optimization"]["overlap_comm"] is True
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["comms_logger"] == {}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage is decided by parallel\.zero"),
        ({"gradient_clipping": 2}, r"gradient_clipping is decided by train\.clip"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled is decided by train\.dtype"),
        ({"optimizer": {"type": "Adam", "params": {}}}, r"optimizer\.type is decided by optimizer\.kind"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            r"zero_optimization\.offload_param\.device is decided by parallel\.offload",
        ),
        ({"steps_per_print": 10}, r"steps_per_print is generated, as 4611686018427387904"),
        ({"zero_optimization": 3}, "zero_optimization does not have the form of what is generated for it"),
        ({"steps_per_print": {"a": 1}}, r"steps_per_print\.a does not have the form"),
        ({"fp16": {"enabled": True}, "scheduler": {"type": "x"}}, r"fp16\.enabled .*; scheduler\.type "),
    ],
)
def test_what_is_decided_elsewhere_is_named(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepspeed_settings(stage=2, clip=1, extra=extra)


def test_every_key_that_is_ours_is_refused() -> None:
    for key in OURS:
        extra: Any = 1
        for name in reversed(key.split(".")):
            extra = {name: extra}
        with pytest.raises(ValueError, match="is decided by"):
            deepspeed_settings(stage=2, clip=1, extra=extra)
