"""Causal language models of transformers, this program's own among them: loaded frozen, and told apart."""

import contextlib
import hashlib
from collections.abc import Generator
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
        with _quiet_transformers():
            load = cast(Any, AutoModelForCausalLM.from_pretrained)
            model, loading = load(
                place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **OF_MODELS
            )
    except Exception as error:  # transformers, safetensors and the hub client have no common base exception
        raise CocomixError(f"cannot load a causal language model from {path}: {first_line(error)}") from None
    _require_all_weights(path, loading)
    if getattr(model.config, "auto_map", None):
        note_once(f"{path} asks for code of its own to be run; it is not")
    if model.config.model_type == "cocomix" and not has_checksums:
        note_once(f"{path} comes without checksums: damage in it may go unnoticed")
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def _quiet_transformers() -> Generator[None]:
    """Inside, transformers prints no report of what it has loaded."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _require_all_weights(path: Any, loading: dict[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers, and say what it leaves aside."""
    where = f"cannot load a causal language model from {path}: its weights do not fit its config"
    for name, stored, expected in sorted(loading["mismatched_keys"]):
        raise CocomixError(f"{where}: {name} has shape {list(stored)} and should have {list(expected)}")
    for name in sorted(loading["missing_keys"]):
        raise CocomixError(f"{where}: {name} is missing")
    unexpected = sorted(loading["unexpected_keys"])
    if unexpected:
        note_once(f"{path} has weights that its model has no place for and that are left aside: {unexpected[0]}, ...")


def fingerprint(model: "PreTrainedModel") -> str:
    """SHA-256 over the model's type, its parameters' names and their float32 values, hexadecimal."""
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
