"""Causal language models of transformers, this program's own among them: loaded frozen, and told apart."""

import hashlib
from typing import TYPE_CHECKING, Any, cast

import torch

from cocomix.core.errors import CocomixError
from cocomix.core.manifest import require_sound
from cocomix.core.model_names import OF_MODELS, as_transformers_names_it, first_line
from cocomix.core.output import note_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_language_model(path) -> "PreTrainedModel":
    """Load a causal language model (a transformers folder, or "hf:NAME" from the hub) in float32, frozen and in
    evaluation mode. No code that lies beside it is run, and only safetensors are read.

    Raises `CocomixError` where there is no such model, and where its files are not those that its manifest lists.
    """
    from transformers import AutoModelForCausalLM

    try:
        place = as_transformers_names_it(path)
        has_checksums = require_sound(place)
        load = cast(Any, AutoModelForCausalLM.from_pretrained)
        model, loading = load(place, dtype=torch.float32, output_loading_info=True, **OF_MODELS)
    except Exception as error:  # transformers, safetensors and the hub client have no common base exception
        raise CocomixError(f"cannot load a causal language model from {path}: {first_line(error)}") from None
    missing = sorted(loading["missing_keys"])
    if missing:  # which transformers fills with random numbers
        raise CocomixError(f"cannot load a causal language model from {path}: its weights lack {missing[0]}")
    if getattr(model.config, "auto_map", None):
        note_once(f"{path} asks for code of its own to be run; it is not")
    if model.config.model_type == "cocomix" and not has_checksums:
        note_once(f"{path} comes without checksums: damage in it may go unnoticed")
    return model.requires_grad_(False).eval()


def fingerprint(model: "PreTrainedModel") -> str:
    """SHA-256 over the model's type, its parameters' names and their float32 values, hexadecimal."""
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
