"""The student's DeepSpeed engine: settings, optimizer, schedule, and what runs inside its blocks."""

import contextlib
import io
from typing import Any

import torch

from cocomix.core.config import Config, TrainConfig
from cocomix.core.errors import CocomixError
from cocomix.distributed.ranks import import_deepspeed
from cocomix.training.schedule import learning_rate_factor

_MANAGED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr, train.beta1, train.beta2, train.eps and train.weight_decay",
    "scheduler": "train.schedule, train.warmup_steps and train.min_lr_ratio",
    "bf16": "train.precision",
    "fp16": "train.precision",
}
_MANAGED_OF_ZERO = {"stage": "train.zero_stage", "offload_optimizer": "train.offload_optimizer"}
# Compiled variants of a block: three kinds of block, with and without gradients, whole and partial batches.
_BLOCK_VARIANTS = 32


def deepspeed_config(config: Config, world: int) -> dict:
    """DeepSpeed's settings: the config's `deepspeed:` section with the training section filled in.

    Raises `CocomixError` where the section sets what belongs to `train:`, and where batch sizes do not divide.
    """
    train = config.train
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise CocomixError(f"deepspeed.zero_optimization is {zero!r}; it must be a section of DeepSpeed's settings")
    _refuse_managed(config.deepspeed, _MANAGED, "deepspeed")
    _refuse_managed(zero, _MANAGED_OF_ZERO, "deepspeed.zero_optimization")
    if train.global_batch % (train.micro_batch * world):
        raise CocomixError(
            f"train.global_batch ({train.global_batch}) must be a multiple of train.micro_batch ({train.micro_batch}) "
            f"x {world} ranks"
        )
    settings = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch // (train.micro_batch * world),
        "gradient_clipping": train.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if train.precision == "bf16":
        # Without the last two DeepSpeed sums gradients over micro batches and ranks in bf16.
        settings |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return {**settings, **config.deepspeed, "zero_optimization": _zero_settings(train, zero)}


def _refuse_managed(section: dict, managed: dict[str, str], name: str) -> None:
    """Raise `CocomixError` where the section `name` sets what is filled in from elsewhere."""
    for key, owner in managed.items():
        if key in section:
            raise CocomixError(f"{name}.{key} is filled in from {owner}: set that instead")


def _zero_settings(train: TrainConfig, zero: dict) -> dict:
    settings: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3:
        # By default DeepSpeed replaces torch's linear function for the whole process, and a bf16 teacher beside the
        # student then gives other labels.
        settings["memory_efficient_linear"] = False
    if train.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {**settings, **zero}


def build_engine(model, config: Config, device: torch.device, world: int):
    """Put the student under DeepSpeed with AdamW and the config's schedule; every parameter decays.

    The optimizer is made here, from whole parameters, since ZeRO-3 leaves them without shape or elements. Raises
    `CocomixError` for settings that DeepSpeed refuses.
    """
    train = config.train
    if device.type == "cpu" and train.attention_backend not in (None, "torch"):
        raise CocomixError(f"train.attention_backend={train.attention_backend} needs a GPU, and this machine has none")
    model = model.to(device)
    model.transformer.set_attention_backend(train.attention_backend)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(train, config.total_steps))
    settings = deepspeed_config(config, world)
    deepspeed = import_deepspeed()
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if train.compile:
        _compile_blocks(model, train.zero_stage)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer reports memory there
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    except (ValueError, AssertionError) as error:  # ValueError: pydantic's too
        reason = " ".join(str(error).split())
        raise CocomixError(f"DeepSpeed does not take the settings in `deepspeed:`: {reason}") from error
    return engine


def _compile_blocks(model, zero_stage: int) -> None:
    """Compile each block's forward. At stage 3 a block is gathered as a whole, before its compiled part begins:
    DeepSpeed's hooks inside it would break it into dozens of graphs."""
    blocks = model.transformer.h
    if zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [type(blocks[0])])
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _BLOCK_VARIANTS)
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)  # a graph for T positions and one for 2T
