"""The files that sparse autoencoders come in: OpenAI's, EleutherAI's sparsify, SAELens and this program's own.

Each reader returns the arguments of `SparseAutoencoder`: tensors in fp32 on the CPU, in that class's layout, and
settings. Nothing is ever unpickled.
"""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json
from cocomix.core.manifest import require_sound
from cocomix.core.output import note_once
from cocomix.core.records import Count, as_record
from cocomix.core.torch_files import load_tensors

FORMAT = "cocomix-sae"
VERSION = 1
DEFAULT_K = 32  # latents kept of an SAE whose file names no number, as in the paper

_SUPPORTED = (
    f"supported: a folder that `cocomix sae` wrote (config.json with format {FORMAT!r} and sae.safetensors), an OpenAI "
    "autoencoder file (.pt), an EleutherAI sparsify folder (cfg.json and sae.safetensors) and a SAELens folder "
    "(cfg.json and sae_weights.safetensors)"
)
# What SAELens calls its input normalisation, in the words of `SparseAutoencoder`.
_SAELENS_NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    None: "none",
    False: "none",
}


@dataclass(frozen=True)
class SavedConfig:
    """config.json of a folder that `SparseAutoencoder.save` wrote. `metrics` and `training` are whatever they were."""

    format: str
    version: int
    n_latents: Count
    d_model: Count
    k: Count
    normalize: bool | str = False
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def read_sae(path: Path) -> dict:
    """Arguments of `SparseAutoencoder` from any supported file or folder; `k` is None where the SAE names none.

    Raises `CocomixError` for an unknown format, a variant that the class cannot represent, and broken files.
    """
    return _read_openai(path) if path.is_file() else _read_folder(path)


def read_saved_config(folder) -> SavedConfig:
    """config.json of a folder that `SparseAutoencoder.save` wrote.

    Raises `CocomixError` when the file is missing or broken, or is another program's.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, "the SAE's config")
    if config.get("format") != FORMAT:
        raise CocomixError(f"{path} has format {config.get('format')!r}, expected {FORMAT!r}; {_SUPPORTED}")
    if config.get("version") != VERSION:
        raise CocomixError(
            f"{path} has version {config.get('version')!r}; this program reads version {VERSION}: update it, or train "
            "the SAE again"
        )
    return as_record(SavedConfig, config, path, finite=False)  # a metric may be a quotient of nothing


def _read_openai(path: Path) -> dict:
    """OpenAI's published format: encoder.weight [C, d], decoder.weight [d, C].

    As its own loader does, TopK autoencoders normalise their input and ReLU ones do not; a file without `activation`
    is a ReLU one (github.com/openai/sparse_autoencoder, `Autoencoder.from_state_dict`).
    """
    content = _torch_load(path)
    if not isinstance(content, dict) or "encoder.weight" not in content:
        found = f"a dict with {_listing(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise CocomixError(f"{path} holds {found}, not an SAE; {_SUPPORTED}")
    names = {
        "W_enc": "encoder.weight",
        "latent_bias": "latent_bias",
        "pre_bias": "pre_bias",
        "decoder": "decoder.weight",
    }
    settings = {**_take(content, names, path), **_openai_activation(content, path)}
    # A 2-D check before the transpose; the shapes as a whole are checked where the SAE is built.
    if settings["decoder"].dim() == 2:
        settings["decoder"] = settings["decoder"].T.contiguous()
    return settings


def _openai_activation(content: dict, path: Path) -> dict:
    activation = content.get("activation", "ReLU")
    if activation == "ReLU":
        return {"k": None, "normalize": "none"}
    if activation != "TopK":
        raise CocomixError(f"{path}: its activation is {activation!r}; TopK and ReLU autoencoders are supported")
    state = content.get("activation_state_dict") or {}
    k = state.get("k", content.get("activation.k"))
    if k is None:
        raise CocomixError(f"{path}: k is missing: neither activation_state_dict nor activation.k holds it")
    postact = state.get("postact_fn", content.get("activation.postact_fn", "ReLU"))
    if postact != "ReLU":
        raise CocomixError(f"{path}: {postact!r} follows its TopK; only ReLU is supported")
    return {"k": int(k), "normalize": "layer_norm"}


def _torch_load(path: Path):
    try:
        return load_tensors(path)
    except pickle.UnpicklingError as error:
        if "unsupported" in str(error).lower():
            raise CocomixError(
                f"{path} needs unpickling, which could run any code and is refused: it holds more than tensors and "
                "plain values; save its tensors as a dict, or use an SAE in another format"
            ) from None
        raise CocomixError(f"{path} was not written by torch.save, or is damaged; {_SUPPORTED}") from None
    except Exception as error:  # torch.load promises no common base for what a damaged file raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CocomixError(f"{path} cannot be read, it may be truncated: {reason}; fetch or copy it again") from None


def _read_folder(folder: Path) -> dict:
    if (folder / "cfg.json").is_file():
        if (folder / "sae_weights.safetensors").is_file():
            return _read_saelens(folder)
        if (folder / "sae.safetensors").is_file():
            return _read_sparsify(folder)
    elif (folder / "config.json").is_file() and (folder / "sae.safetensors").is_file():
        return _read_own(folder)
    names = sorted(entry.name for entry in folder.iterdir())
    inner = [entry for entry in names if (folder / entry / "cfg.json").is_file()]
    if inner:
        raise CocomixError(f"{folder} holds several SAEs ({_listing(inner)}): name one of them")
    raise CocomixError(f"{folder} is not an SAE folder: it holds {_listing(names) or 'nothing'}; {_SUPPORTED}")


def _read_own(folder: Path) -> dict:
    config = read_saved_config(folder)
    if not require_sound(folder):
        note_once(f"{folder} was made by an earlier version, without checksums: damage in it may go unnoticed")
    path = folder / "sae.safetensors"
    content = _load_safetensors(path)
    names = ("W_enc", "latent_bias", "pre_bias", "decoder", *(["threshold"] if "threshold" in content else []))
    tensors = _take(content, {name: name for name in names}, path)
    expected = [config.n_latents, config.d_model]
    if list(tensors["W_enc"].shape) != expected:
        raise CocomixError(
            f"{folder}: config.json says [n_latents, d_model] = {expected}, but W_enc in "
            f"sae.safetensors is {list(tensors['W_enc'].shape)}; the two are not of one SAE"
        )
    return {**tensors, "k": config.k, "normalize": config.normalize}


def _read_sparsify(folder: Path) -> dict:
    """EleutherAI's sparsify: b_dec is subtracted from the raw input and added to the output; no normalisation."""
    config = read_json(folder / "cfg.json", "the sparsify config")
    for variant in ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed"):
        if config.get(variant):
            raise CocomixError(f"{folder}: a sparsify coder with {variant} is not a plain autoencoder; not supported")
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise CocomixError(f"{folder}: sparsify activation {activation!r} is not supported; topk is")
    path = folder / "sae.safetensors"
    names = {"W_enc": "encoder.weight", "latent_bias": "encoder.bias", "pre_bias": "b_dec", "decoder": "W_dec"}
    k = _required_k(config.get("k"), folder / "cfg.json")
    return {**_take(_load_safetensors(path), names, path, exact=True), "k": k, "normalize": "none"}


def _read_saelens(folder: Path) -> dict:
    """SAELens: W_enc is [d, C]; the architectures topk, standard (ReLU) and jumprelu.

    Its "layer_norm" and "constant_norm_rescale" are the class's "layer_norm" and "constant_norm" to the letter.
    """
    config = read_json(folder / "cfg.json", "the SAELens config")
    architecture = _saelens_architecture(config, folder)
    normalization = _saelens_normalization(config, folder)
    path = folder / "sae_weights.safetensors"
    names = {"W_enc": "W_enc", "latent_bias": "b_enc", "pre_bias": "b_dec", "decoder": "W_dec"}
    if architecture == "jumprelu":
        names["threshold"] = "threshold"
    settings = _take(_load_safetensors(path), names, path, exact=True)
    if settings["W_enc"].dim() == 2:
        settings["W_enc"] = settings["W_enc"].T.contiguous()
    fits = settings["W_enc"].shape == settings["decoder"].shape
    fits = fits and settings["pre_bias"].shape == settings["W_enc"].shape[1:]
    if fits and architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        _fold_decoder_norms(settings)
    if fits and not config.get("apply_b_dec_to_input", True):
        # W_enc x + b = W_enc (x - b_dec) + (b + W_enc b_dec): the encoder of the class always subtracts.
        settings["latent_bias"] = settings["latent_bias"] + settings["W_enc"] @ settings["pre_bias"]
    k = None
    if architecture == "topk":
        k = _required_k(config.get("k", (config.get("activation_fn_kwargs") or {}).get("k")), folder / "cfg.json")
    return {**settings, "k": k, "normalize": normalization}


def _saelens_architecture(config: dict, folder: Path) -> str:
    """ "topk", "standard" or "jumprelu". Before version 6, a TopK SAE was a standard one with another activation."""
    architecture = config.get("architecture", "standard")
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation == "topk":
        architecture = "topk"
    elif activation != "relu":
        raise CocomixError(f"{folder}: SAELens activation {activation!r} is not supported; relu and topk are")
    if architecture not in ("topk", "standard", "jumprelu"):
        raise CocomixError(
            f"{folder}: SAELens architecture {architecture!r} is not supported; topk, standard and jumprelu are"
        )
    return architecture


def _saelens_normalization(config: dict, folder: Path) -> str:
    """The class's name of its input normalisation; what the class cannot do is refused here."""
    normalization = config.get("normalize_activations", "none")
    if normalization not in _SAELENS_NORMALIZATIONS:
        known = ", ".join(str(name) for name in _SAELENS_NORMALIZATIONS if name)
        raise CocomixError(
            f"{folder}: SAELens normalize_activations {normalization!r} is not supported, {known} are: it takes "
            "numbers from the training that are not in the folder; fold them into the weights with SAELens and save it "
            "again"
        )
    if config.get("finetuning_scaling_factor"):
        raise CocomixError(
            f"{folder}: a SAELens SAE with finetuning_scaling_factor is not supported; fold it into the weights"
        )
    hook = str(config.get("hook_name", config.get("hook_point", "")))
    if config.get("reshape_activations", "hook_z" if "hook_z" in hook else "none") != "none":
        raise CocomixError(f"{folder}: it reads attention heads (reshape_activations), not the residual stream")
    return _SAELENS_NORMALIZATIONS[normalization]


def _fold_decoder_norms(settings: dict) -> None:
    """Scale pre-activations by the norms of the decoder's rows, and the rows to one: the same reconstruction, and the
    selection that `rescale_acts_by_decoder_norm` asks for."""
    norms = settings["decoder"].norm(dim=1).clamp(min=1e-8)
    settings["W_enc"] = settings["W_enc"] * norms[:, None]
    settings["latent_bias"] = settings["latent_bias"] * norms
    settings["decoder"] = settings["decoder"] / norms[:, None]


def _required_k(k, config: Path) -> int:
    if k is None:
        raise CocomixError(f"{config} names no k, the number of latents that a TopK SAE keeps")
    if type(k) is not int or k < 1:
        raise CocomixError(f"{config}: k is {k!r}, not a number of latents")
    return k


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CocomixError(f"{path} cannot be read, it may be truncated: {error}; fetch or copy it again") from None


def _take(content: dict, names: dict[str, str], path: Path, exact: bool = False) -> dict[str, Tensor]:
    """The tensors `names` (ours -> the file's), in fp32. `exact`: any further tensor is a variant unknown here."""
    missing = [name for name in names.values() if not isinstance(content.get(name), Tensor)]
    if missing:
        raise CocomixError(f"{path}: missing {_listing(missing)}; it holds {_listing(content)}")
    surplus = sorted(set(content) - set(names.values()))
    if exact and surplus:
        raise CocomixError(
            f"{path}: it also holds {_listing(surplus)}, which a plain SAE has no use for; "
            "this variant is not supported"
        )
    tensors = {ours: content[theirs].to(torch.float32) for ours, theirs in names.items()}
    for ours, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CocomixError(f"{path}: {names[ours]} holds NaN or infinity; the SAE is damaged")
    return tensors


def _listing(names) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
