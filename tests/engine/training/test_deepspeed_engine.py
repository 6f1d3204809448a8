"""Settings, schedule and what DeepSpeed refuses."""

import pytest
from run_helpers import stage, uneven

from cocomix.core.errors import CocomixError
from cocomix.training.deepspeed_engine import deepspeed_config


def test_deepspeed_settings_are_filled_in_from_the_training_section(world):
    settings = deepspeed_config(world.load("train.global_batch=24", "train.grad_clip=0.5", "train.zero_stage=2"), 3)
    assert settings["train_batch_size"] == 24
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 2
    assert "bf16" not in settings


def test_bf16_sums_and_sends_gradients_in_fp32_unless_told_otherwise(world):
    settings = deepspeed_config(world.load("train.precision=bf16"), 1)
    assert settings["bf16"] == {"enabled": True}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    told = deepspeed_config(world.load("train.precision=bf16", "deepspeed.communication_data_type=bf16"), 1)
    assert told["communication_data_type"] == "bf16"


def test_the_deepspeed_section_goes_through_beside_the_stage(world):
    settings = deepspeed_config(
        world.load("deepspeed.zero_optimization.reduce_bucket_size=1000", "deepspeed.wall_clock_breakdown=true"), 1
    )
    assert settings["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 1}
    assert settings["wall_clock_breakdown"] is True


def test_stage_3_leaves_the_processs_linear_function_alone_unless_told_otherwise(world):
    assert deepspeed_config(world.load(*stage(3)), 1)["zero_optimization"]["memory_efficient_linear"] is False
    told = world.load(*stage(3), "deepspeed.zero_optimization.memory_efficient_linear=true")
    assert deepspeed_config(told, 1)["zero_optimization"]["memory_efficient_linear"] is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deepspeed.train_batch_size=8", "deepspeed.train_batch_size is filled in from train.global_batch"),
        ("deepspeed.train_micro_batch_size_per_gpu=8", "train.micro_batch"),
        ("deepspeed.gradient_accumulation_steps=2", "train.global_batch and train.micro_batch"),
        ("deepspeed.gradient_clipping=2", "train.grad_clip"),
        ("deepspeed.optimizer.type=Adam", "train.lr"),
        ("deepspeed.scheduler.type=WarmupLR", "train.warmup_steps"),
        ("deepspeed.bf16.enabled=true", "train.precision"),
        ("deepspeed.fp16.enabled=true", "train.precision"),
        ("deepspeed.zero_optimization.stage=3", "train.zero_stage"),
        ("deepspeed.zero_optimization.offload_optimizer.device=nvme", "train.offload_optimizer"),
        ("deepspeed.zero_optimization=3", "must be a section"),
        ("train.global_batch=12", r"train.global_batch \(12\) must be a multiple of train.micro_batch \(4\) x 2 ranks"),
    ],
)
def test_settings_that_belong_elsewhere_or_do_not_divide_are_refused_by_name(world, override, message):
    with pytest.raises(CocomixError, match=message):
        deepspeed_config(world.load(override), 2)


def test_bf16_at_stage_0_is_refused(world):
    with pytest.raises(CocomixError, match="train.precision=bf16 needs train.zero_stage 1, 2 or 3"):
        world.load("train.precision=bf16", "train.zero_stage=0")


def test_a_value_that_deepspeed_refuses_is_one_line(world, capsys):
    assert world.train("refused", *uneven(world), "deepspeed.zero_optimization.reduce_bucket_size=many") == 2
    assert "reduce_bucket_size" in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_attention_backend_without_its_gpu_is_refused(world, capsys):
    assert world.train("no-gpu", "train.attention_backend=flash") == 2
    assert "train.attention_backend=flash needs a GPU" in capsys.readouterr().err
