"""Checkpoints of others: the paper's public code and transformers' GPT-2."""

import functools
from pathlib import Path
from typing import Any, cast

import torch

from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json

_COMPRESS = "transformer.compress_layer.weight"
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


def from_reference(model_class, path_or_state_dict, concept_dim, insert_layer, concept_topk, n_head=None):
    """See `CoCoMixForCausalLM.from_reference`."""
    settings = {}
    if isinstance(path_or_state_dict, dict):
        state, where = dict(path_or_state_dict), "the state dict"
    else:
        folder, where = Path(path_or_state_dict), str(path_or_state_dict)
        stored = read_json(folder / "config.json", "the checkpoint's config")
        n_head = n_head or stored.get("n_head")
        settings = {key: stored[key] for key in ("layer_norm_epsilon", "bos_token_id", "eos_token_id") if key in stored}
        state = _read_weights(folder)
    if n_head is None:
        raise CocomixError(f"{where} does not tell the number of heads: pass n_head")
    missing = [name for name in ("transformer.wte.weight", "transformer.wpe.weight", _COMPRESS) if name not in state]
    if missing:
        raise CocomixError(f"{where} is not a checkpoint of the public CoCoMix code: {', '.join(missing)} is missing")
    if state[_COMPRESS].shape[1] != concept_dim:
        raise CocomixError(
            f"{where} holds {state[_COMPRESS].shape[1]} concepts but concept_dim is {concept_dim}: pass the "
            "checkpoint's own number"
        )
    state[_COMPRESS] = state[_COMPRESS].t().contiguous()
    try:
        config = model_class.config_class(
            **_shape(state),
            n_head=n_head,
            concept_dim=concept_dim,
            insert_layer=insert_layer,
            concept_topk=concept_topk,
            **settings,
        )
    except ValueError as error:
        raise CocomixError(f"{where} does not fit the given settings: {error}") from None
    return _build(model_class, config, state, where)


def from_gpt2(model_class, path_or_model):
    """See `CoCoMixForCausalLM.from_gpt2`."""
    from cocomix.model.pretrained import load_language_model

    if isinstance(path_or_model, torch.nn.Module):
        model, where = path_or_model, "the given model"
    else:
        model, where = load_language_model(path_or_model), str(path_or_model)
    config = cast(Any, model.config)
    if config.model_type != "gpt2":
        raise CocomixError(f"{where} is a {config.model_type} model; from_gpt2 takes GPT-2 only")
    variant = [
        name
        for name, differs in {
            f"activation_function={config.activation_function}": config.activation_function not in _TANH_GELU,
            f"n_inner={config.n_inner}": config.n_inner not in (None, 4 * config.n_embd),
            "scale_attn_weights=False": not config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx=True": config.scale_attn_by_inverse_layer_idx,
            "add_cross_attention=True": config.add_cross_attention,
        }.items()
        if differs
    ]
    if variant:
        raise CocomixError(f"{where} is a variant of GPT-2 that is not supported: {', '.join(variant)}")
    own = model_class.config_class(
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        vocab_size=config.vocab_size,
        n_positions=config.n_positions,
        layer_norm_epsilon=config.layer_norm_epsilon,
        mixing="none",
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    state = model.state_dict()
    if "transformer.wte.weight" not in state:
        raise CocomixError(f"{where} is a {type(model).__name__}; from_gpt2 takes a causal language model")
    return _build(model_class, own, state, where)


def _shape(state):
    vocab_size, n_embd = state["transformer.wte.weight"].shape
    n_layer = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.h."))
    return {
        "vocab_size": vocab_size,
        "n_embd": n_embd,
        "n_layer": n_layer,
        "n_positions": state["transformer.wpe.weight"].shape[0],
    }


def _read_weights(folder: Path):
    from safetensors.torch import load_file

    readers = {
        "model.safetensors": load_file,
        "pytorch_model.bin": functools.partial(torch.load, map_location="cpu", weights_only=True),
    }
    for name, read in readers.items():
        if (folder / name).is_file():
            try:
                return read(folder / name)
            except Exception as error:  # neither reader promises a common base for what a damaged file raises
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise CocomixError(f"{folder / name} cannot be read, it may be damaged: {reason}") from None
    raise CocomixError(f"{folder} holds no weights: expected {' or '.join(readers)}")


def _build(model_class, config, state, where):
    model = model_class(config)
    state = {name: value for name, value in state.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])  # tied
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CocomixError(f"{where} does not fit the model that its settings describe: {error}") from None
    model.tie_weights()
    return model.eval()
