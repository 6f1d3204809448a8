"""TopK sparse autoencoders: encode, decode, and the file formats they come in."""

import hashlib
import io
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from cocomix.errors import CocomixError
from cocomix.files import atomic_folder, read_json, write_json
from cocomix.kernels import topk_linear

FORMAT = "cocomix-sae"
VERSION = 1
STD_EPS = 1e-5

_SUPPORTED = (
    f"supported: a folder that `cocomix sae` wrote (config.json with format {FORMAT!r} and sae.safetensors), an OpenAI "
    "autoencoder file (.pt), an EleutherAI sparsify folder (cfg.json and sae.safetensors) and a SAELens folder "
    "(cfg.json and sae_weights.safetensors)"
)


class SparseAutoencoder(nn.Module):
    """TopK sparse autoencoder with untied weights.

    latents = ReLU(TopK_k(W_enc (x_hat - pre_bias) + latent_bias)); reconstruction = latents @ decoder + pre_bias.
    With `normalize`, x_hat is the input with its own mean and standard deviation taken out, and the reconstruction
    gets them back (Gao et al. 2024, "Scaling and evaluating sparse autoencoders"); without, x_hat is the input.

    Parameters (fp32): `W_enc` [C, d], `latent_bias` [C], `pre_bias` [d], `decoder` [C, d], one row a latent.
    Raises `CocomixError` for shapes that contradict each other and for k outside 1..C.
    """

    def __init__(
        self, W_enc: Tensor, latent_bias: Tensor, pre_bias: Tensor, decoder: Tensor, k: int, *, normalize: bool
    ):
        super().__init__()
        _check_shapes(W_enc, latent_bias, pre_bias, decoder, k)
        self.W_enc = nn.Parameter(W_enc)
        self.latent_bias = nn.Parameter(latent_bias)
        self.pre_bias = nn.Parameter(pre_bias)
        self.decoder = nn.Parameter(decoder)
        self.k = k
        self.input_normalization = normalize

    @property
    def d_model(self) -> int:
        """d: width of the activations it reads."""
        return self.W_enc.shape[1]

    @property
    def n_latents(self) -> int:
        """C: number of latents."""
        return self.W_enc.shape[0]

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_latents={self.n_latents}, k={self.k}, normalize={self.input_normalization}"

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per-token input normalisation: x [..., d] -> x_hat [..., d], mean [..., 1], std [..., 1].

        The standard deviation has the unbiased (d - 1) divisor; 1e-5 is added to it after the root where it divides,
        and not in what is returned. Half-precision inputs are taken to fp32. An SAE without input normalisation
        returns x, zeros and ones.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.input_normalization:
            statistic = x.new_zeros(*x.shape[:-1], 1)
            return x, statistic, statistic + 1
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        std = centred.std(-1, keepdim=True)
        return centred / (std + STD_EPS), mean, std

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw activations x [..., d] -> latents (values [..., k] descending, indices [..., k] int64), ReLU applied."""
        return self.encode_normalized(self.normalize(x)[0])

    def encode_normalized(self, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` for inputs that `normalize` has been through: x_hat [..., d]."""
        flat = (x_hat - self.pre_bias).to(self.W_enc.dtype).reshape(-1, self.d_model)
        values, indices = topk_linear(flat, self.W_enc, self.latent_bias, self.k, relu=True)
        shape = (*x_hat.shape[:-1], self.k)
        return values.view(shape), indices.view(shape)

    def decode(
        self, values: Tensor, indices: Tensor, mean: Tensor | None = None, std: Tensor | None = None
    ) -> Tensor:
        """Latents (values, indices [..., k]) -> reconstruction [..., d].

        In the normalised space; with `mean` and `std` ([..., 1], from `normalize`), in the space of the raw input.
        """
        flat_values = values.reshape(-1, values.shape[-1]).to(self.decoder.dtype)
        flat_indices = indices.reshape(-1, indices.shape[-1])
        summed = F.embedding_bag(flat_indices, self.decoder, per_sample_weights=flat_values, mode="sum")
        reconstruction = summed.view(*values.shape[:-1], self.d_model) + self.pre_bias
        return reconstruction if mean is None else reconstruction * std + mean

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [..., d] of raw activations x [..., d]."""
        x_hat, mean, std = self.normalize(x)
        return self.decode(*self.encode_normalized(x_hat), mean, std)

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over settings and numbers, whatever format or device they came from."""
        digest = hashlib.sha256(f"{self.n_latents} {self.d_model} {self.k} {self.input_normalization}".encode())
        for tensor in self._tensors().values():
            digest.update(tensor.float().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder, *, metrics: dict | None = None, training: dict | None = None) -> None:
        """Write `config.json` and `sae.safetensors`; the folder appears whole or not at all.

        `metrics` (figures of merit) and `training` (what it was trained with) go into config.json as they are.
        """
        config = {
            "format": FORMAT,
            "version": VERSION,
            "d_model": self.d_model,
            "n_latents": self.n_latents,
            "k": self.k,
            "normalize": self.input_normalization,
        }
        config |= {name: value for name, value in (("metrics", metrics), ("training", training)) if value is not None}
        with atomic_folder(folder) as aside:
            # Bytes first: safetensors' own writer reports a full disk as an error that is no OSError.
            (aside / "sae.safetensors").write_bytes(to_safetensors(self._tensors()))
            write_json(aside / "config.json", config)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"W_enc": self.W_enc, "latent_bias": self.latent_bias}
        tensors |= {"pre_bias": self.pre_bias, "decoder": self.decoder}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def load(cls, path) -> "SparseAutoencoder":
        """Read an SAE, on the CPU, in fp32.

        `path` is an OpenAI autoencoder file (`torch.save` of a dict), a sparsify folder, a SAELens folder with the
        "topk" architecture, or a folder that `save` wrote. Nothing is ever unpickled. Raises `CocomixError` for a
        missing path, an unknown format, a variant this class cannot represent, and broken or contradictory files.
        """
        path = Path(path)
        if not path.exists():
            raise CocomixError(f"no SAE at {path}: check teacher.sae, or train one with `cocomix sae`")
        settings = _read_openai(path) if path.is_file() else _read_folder(path)
        try:
            return cls(**settings)
        except CocomixError as error:
            raise CocomixError(f"{path}: {error}") from None


def read_saved_config(folder) -> dict:
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
    return config


def _check_shapes(W_enc, latent_bias, pre_bias, decoder, k) -> None:
    shapes = f"W_enc {_shape(W_enc)}, latent_bias {_shape(latent_bias)}, pre_bias {_shape(pre_bias)}, " \
             f"decoder {_shape(decoder)}"
    fits = W_enc.dim() == 2 and W_enc.shape == decoder.shape
    fits = fits and latent_bias.shape == W_enc.shape[:1] and pre_bias.shape == W_enc.shape[1:]
    if not fits:
        raise CocomixError(
            f"the SAE's tensors contradict each other: {shapes}; expected [C, d], [C], [d] and [C, d] with one C "
            "(latents) and one d (width); the file is damaged or of another kind"
        )
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= W_enc.shape[0]:
        raise CocomixError(f"the SAE's k is {k!r}; it must be a whole number from 1 to its {W_enc.shape[0]} latents")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _read_openai(path: Path) -> dict:
    """Settings from OpenAI's published format: encoder.weight [C, d], decoder.weight [d, C], activation "TopK"."""
    content = _torch_load(path)
    if not isinstance(content, dict) or "encoder.weight" not in content:
        found = f"a dict with {_listing(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise CocomixError(f"{path} holds {found}, not an SAE; {_SUPPORTED}")
    state = content.get("activation_state_dict") or {}
    activation = content.get("activation")
    if activation != "TopK":
        raise CocomixError(f"{path}: its activation is {activation!r}; only TopK autoencoders are supported")
    k = state.get("k", content.get("activation.k"))
    if k is None:
        raise CocomixError(f"{path}: k is missing: neither activation_state_dict nor activation.k holds it")
    postact = state.get("postact_fn", content.get("activation.postact_fn", "ReLU"))
    if postact != "ReLU":
        raise CocomixError(f"{path}: {postact!r} follows its TopK; only ReLU is supported")
    names = {"W_enc": "encoder.weight", "latent_bias": "latent_bias", "pre_bias": "pre_bias",
             "decoder": "decoder.weight"}
    tensors = _take(content, names, path)
    # A 2-D check before the transpose; the shapes as a whole are checked where the SAE is built.
    if tensors["decoder"].dim() == 2:
        tensors["decoder"] = tensors["decoder"].T.contiguous()
    return {**tensors, "k": int(k), "normalize": True}


def _torch_load(path: Path):
    try:
        return torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported" in str(error).lower():
            raise CocomixError(
                f"{path} needs unpickling, which could run any code and is refused: it holds more than tensors and "
                "plain values; save its tensors as a dict, or use an SAE in another format"
            ) from None
        raise CocomixError(f"{path} is no file that torch.save wrote, or a damaged one; {_SUPPORTED}") from None
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
    raise CocomixError(f"{folder} is no SAE folder: it holds {_listing(names) or 'nothing'}; {_SUPPORTED}")


def _read_own(folder: Path) -> dict:
    config = read_saved_config(folder)
    path = folder / "sae.safetensors"
    tensors = _take(_load_safetensors(path), {name: name for name in _TENSORS}, path)
    expected = [config.get("n_latents"), config.get("d_model")]
    if list(tensors["W_enc"].shape) != expected:
        raise CocomixError(f"{folder}: config.json says [n_latents, d_model] = {expected}, but W_enc in "
                           f"sae.safetensors is {_shape(tensors['W_enc'])}; the two are not of one SAE")
    return {**tensors, "k": config.get("k"), "normalize": bool(config.get("normalize"))}


def _read_sparsify(folder: Path) -> dict:
    """Settings from EleutherAI's sparsify: b_dec is subtracted from the raw input and added to the output."""
    config = read_json(folder / "cfg.json", "the sparsify config")
    for variant in ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed"):
        if config.get(variant):
            raise CocomixError(f"{folder}: a sparsify coder with {variant} is no plain autoencoder; not supported")
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise CocomixError(f"{folder}: sparsify activation {activation!r} is not supported; topk is")
    path = folder / "sae.safetensors"
    names = {"W_enc": "encoder.weight", "latent_bias": "encoder.bias", "pre_bias": "b_dec", "decoder": "W_dec"}
    return {**_take(_load_safetensors(path), names, path, exact=True), "k": config.get("k"), "normalize": False}


def _read_saelens(folder: Path) -> dict:
    """Settings from SAELens: W_enc is [d, C]; its "layer_norm" is this class's input normalisation to the letter."""
    config = read_json(folder / "cfg.json", "the SAELens config")
    architecture = config.get("architecture", "standard")
    if architecture != "topk":
        raise CocomixError(f"{folder}: SAELens architecture {architecture!r} is not supported; topk is")
    normalization = config.get("normalize_activations", "none")
    if normalization not in ("none", "layer_norm"):
        raise CocomixError(
            f"{folder}: SAELens normalize_activations {normalization!r} is not supported; none and layer_norm are"
        )
    for variant in ("rescale_acts_by_decoder_norm", "finetuning_scaling_factor"):
        if config.get(variant):
            raise CocomixError(f"{folder}: a SAELens SAE with {variant} is not supported; fold it into the weights")
    if config.get("reshape_activations", "none") != "none":
        raise CocomixError(f"{folder}: it reads attention heads (reshape_activations), not the residual stream")
    path = folder / "sae_weights.safetensors"
    names = {"W_enc": "W_enc", "latent_bias": "b_enc", "pre_bias": "b_dec", "decoder": "W_dec"}
    tensors = _take(_load_safetensors(path), names, path, exact=True)
    if tensors["W_enc"].dim() == 2:
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    settings = {**tensors, "k": k, "normalize": normalization == "layer_norm"}
    if not config.get("apply_b_dec_to_input", True):
        _check_shapes(*tensors.values(), k)
        # W_enc x + b = W_enc (x - b_dec) + (b + W_enc b_dec): the encoder of this class always subtracts.
        settings["latent_bias"] = tensors["latent_bias"] + tensors["W_enc"] @ tensors["pre_bias"]
    return settings


_TENSORS = ("W_enc", "latent_bias", "pre_bias", "decoder")


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
        raise CocomixError(f"{path}: it also holds {_listing(surplus)}, which a plain TopK SAE has no use for; "
                           "this variant is not supported")
    tensors = {ours: content[theirs].to(torch.float32) for ours, theirs in names.items()}
    for ours, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CocomixError(f"{path}: {names[ours]} holds NaN or infinity; the SAE is damaged")
    return tensors


def _listing(names) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
