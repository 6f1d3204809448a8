"""Causal language models of transformers, this program's own among them: loaded frozen, and told apart."""

import hashlib
import sys
from typing import TYPE_CHECKING

import torch

from cocomix.core.errors import CocomixError
from cocomix.core.model_names import OF_MODELS, as_transformers_names_it, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_language_model(path) -> "PreTrainedModel":
    """Load a causal language model (a transformers folder, or "hf:NAME" from the hub) in float32, frozen and in
    evaluation mode. No code that lies beside it is run, and only safetensors are read.

    Raises `CocomixError` where there is no such model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(as_transformers_names_it(path), dtype=torch.float32, **OF_MODELS)
    except (CocomixError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CocomixError(f"cannot load a causal language model from {path}: {first_line(error)}") from None
    if getattr(model.config, "auto_map", None):
        print(f"note: {path} asks for code of its own to be run; it is not", file=sys.stderr)
    return model.requires_grad_(False).eval()


def fingerprint(model: "PreTrainedModel") -> str:
    """SHA-256 over the model's type, its parameters' names and their float32 values, hexadecimal."""
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
