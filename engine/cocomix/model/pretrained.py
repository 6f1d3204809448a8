"""Causal language models of transformers, this program's own among them: loaded frozen, and told apart."""

import hashlib
from typing import TYPE_CHECKING

import torch

from cocomix.core.errors import CocomixError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_language_model(path) -> "PreTrainedModel":
    """Load a causal language model (a transformers folder or hub name) in float32, frozen and in evaluation mode.

    Raises `CocomixError` where there is no such model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CocomixError(f"cannot load a causal language model from {path}: {reason}") from None
    return model.requires_grad_(False).eval()


def fingerprint(model: "PreTrainedModel") -> str:
    """SHA-256 over the model's type, its parameters' names and their float32 values, hexadecimal."""
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
