"""The frozen language model: its blocks, its residual stream, and passes whose rounding hangs on the window alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from cocomix.core.config import AUTO
from cocomix.core.errors import CocomixError
from cocomix.core.precision import fastest
from cocomix.data.token_files import TokenFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def teacher_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What `teacher.dtype` means on a device, `auto` included."""
    return DTYPES[fastest(device.type)[0] if precision == AUTO else precision]


# Windows in one pass through the teacher. A matrix product may round differently when its shape changes, so passes
# always have the same shape and labels depend on the window alone, not on the batch that it came in.
_WINDOWS_PER_PASS = {"cpu": 1, "cuda": 8}

# What some architectures do to their logits after the product with the head: Gemma 2, Granite, Cohere, Falcon-H1
_LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def transformer_blocks(model: "PreTrainedModel") -> nn.ModuleList:
    """The list of a causal language model's blocks.

    Raises `CocomixError` where it cannot be found, and for a model that mixes concepts in: it has no one residual
    stream that an SAE could read.
    """
    mixing = getattr(model.config, "mixing", "none")
    if mixing != "none":
        raise CocomixError(
            f"a CoCoMix model with mixing={mixing} cannot be a teacher: use one with mixing=none, or any other causal "
            "language model of transformers"
        )
    n_layer = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layer:
            return module
    raise CocomixError(f"cannot find the {n_layer} blocks of a {model.config.model_type} model")


def check_layer(model: "PreTrainedModel", layer: int) -> None:
    """Raise `CocomixError` unless the model has a block `layer`."""
    n_layer = len(transformer_blocks(model))
    if not 0 <= layer < n_layer:
        raise CocomixError(f"teacher.layer is {layer} but the teacher has blocks 0 to {n_layer - 1}")


def check_head(model: "PreTrainedModel") -> None:
    """Raise `CocomixError` where logits are more than one product of the last hidden states with a matrix."""
    head = model.get_output_embeddings()
    rescaled = any(getattr(model.config, name, None) not in (None, 1.0) for name in _LOGIT_SETTINGS)
    if getattr(head, "bias", None) is not None or rescaled:
        raise CocomixError(
            f"a {model.config.model_type} teacher is not supported: its head is more than one matrix product"
        )


def head_weight(model: "PreTrainedModel") -> torch.Tensor:
    """The matrix [V, d] that makes logits of the last hidden states."""
    return cast(nn.Linear, model.get_output_embeddings()).weight


class _Reached(Exception):
    """Ends a forward pass once the wanted block has run."""


@torch.no_grad()
def residual_stream(model: "PreTrainedModel", layer: int, input_ids: torch.Tensor) -> torch.Tensor:
    """Output of block `layer` (0-based) for input_ids [B, T] -> [B, T, d]; the blocks after it do not run."""
    found = []

    def hook(_module, _args, output):
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = transformer_blocks(model)[layer].register_forward_hook(hook)
    try:
        model.base_model(input_ids=input_ids, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def require_context(model: "PreTrainedModel", length: int, what: str) -> None:
    """Raise `CocomixError` unless the teacher reads windows of `length` tokens; `what` is wanted of it."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise CocomixError(
            f"the {what} are wanted for windows of {length} tokens, but the teacher reads at most {context}: lower "
            "data.seq_len, or take another teacher"
        )


def fixed_passes(function: Callable, input_ids: torch.Tensor) -> torch.Tensor:
    """`function` over windows input_ids [B, T], in passes that all have the same number of windows: [B, ...]."""
    per_pass = _WINDOWS_PER_PASS.get(input_ids.device.type, 1)
    results = []
    for windows in input_ids.split(per_pass):
        missing = per_pass - len(windows)
        filled = torch.cat([windows, windows[-1:].expand(missing, -1)]) if missing else windows
        results.append(function(filled)[: len(windows)])
    return torch.cat(results)


def require_vocabulary(model: "PreTrainedModel", tokens: TokenFiles) -> None:
    """Raise `CocomixError` unless the model's vocabulary covers the token files'."""
    if model.config.vocab_size < tokens.vocab_size:
        raise CocomixError(
            f"the token files in {tokens.folder} use {tokens.vocab_size} ids but the model knows "
            f"{model.config.vocab_size}: it was made for another tokenizer"
        )
