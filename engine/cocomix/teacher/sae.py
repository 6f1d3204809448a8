"""Sparse autoencoders: encode, decode, save and load."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_folder, write_own_json
from cocomix.core.manifest import write_manifest
from cocomix.teacher.sae_formats import DEFAULT_K, FORMAT, VERSION, read_sae
from cocomix_kernels import topk_linear
from cocomix_kernels.common.chunking import row_chunks
from cocomix_kernels.common.selection import stable_topk

STD_EPS = 1e-5
NORMALIZATIONS = ("none", "layer_norm", "constant_norm")
_NAMES: dict[bool | str, str] = {False: "none", True: "layer_norm"}
_PLAIN_NAMES = {name: plain for plain, name in _NAMES.items()}  # as files and fingerprints write them


class SparseAutoencoder(nn.Module):
    """Sparse autoencoder with untied weights, of which at most k latents a token are kept.

    latents = ReLU(TopK_k(W_enc (x_hat - pre_bias) + latent_bias)); reconstruction = latents @ decoder + pre_bias.
    With k at least the number of active latents, that is a ReLU autoencoder. With `threshold` [C] it is a JumpReLU one:
    latents at or below their own threshold are zero, and the k largest of the others are kept.

    `normalize` makes x_hat of the input, per token, and is undone in the reconstruction: "layer_norm" (or True) takes
    out mean and standard deviation (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093),
    "constant_norm" scales to the norm sqrt(d), "none" (or False) leaves the input as it is.

    Parameters (fp32): `W_enc` [C, d], `latent_bias` [C], `pre_bias` [d], `decoder` [C, d], one row a latent.
    Raises `CocomixError` for shapes that contradict each other, for k outside 1..C and an unknown `normalize`.
    """

    threshold: Tensor | None

    def __init__(
        self,
        W_enc: Tensor,
        latent_bias: Tensor,
        pre_bias: Tensor,
        decoder: Tensor,
        k: int,
        *,
        normalize: bool | str,
        threshold: Tensor | None = None,
    ):
        super().__init__()
        _check_shapes(W_enc, latent_bias, pre_bias, decoder, threshold)
        _check_settings(k, W_enc.shape[0], normalize)
        self.W_enc = nn.Parameter(W_enc)
        self.latent_bias = nn.Parameter(latent_bias)
        self.pre_bias = nn.Parameter(pre_bias)
        self.decoder = nn.Parameter(decoder)
        self.register_buffer("threshold", threshold)
        self.k = k
        self.normalization = _NAMES.get(normalize, str(normalize))

    @property
    def d_model(self) -> int:
        """d: width of the activations it reads."""
        return self.W_enc.shape[1]

    @property
    def n_latents(self) -> int:
        """C: number of latents."""
        return self.W_enc.shape[0]

    def extra_repr(self) -> str:
        kind = "" if self.threshold is None else ", jumprelu"
        return f"d_model={self.d_model}, n_latents={self.n_latents}, k={self.k}, {self.normalization}{kind}"

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per-token input normalisation: x [..., d] -> x_hat [..., d], mean [..., 1], std [..., 1].

        x_hat * std + mean is x, but for epsilons. "layer_norm": the standard deviation has the unbiased (d - 1)
        divisor; 1e-5 is added to it after the root where it divides, and not in what is returned. "constant_norm":
        mean is 0 and std the root of the mean square. "none": x, zeros and ones. Half-precision inputs are taken to
        fp32.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        zeros = x.new_zeros(*x.shape[:-1], 1)
        if self.normalization == "none":
            return x, zeros, zeros + 1
        if self.normalization == "constant_norm":
            scale = x.norm(dim=-1, keepdim=True) / self.d_model**0.5
            return x / scale.clamp(min=torch.finfo(x.dtype).tiny), zeros, scale
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        std = centred.std(-1, keepdim=True)
        return centred / (std + STD_EPS), mean, std

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw activations x [..., d] -> latents (values [..., k] descending, indices [..., k] int64).

        Where fewer than k latents are active, the values of the rest are zero and their indices mean nothing.
        """
        return self.encode_normalized(self.normalize(x)[0])

    def encode_normalized(self, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` for inputs that `normalize` has been through: x_hat [..., d]."""
        flat = (x_hat - self.pre_bias).to(self.W_enc.dtype).reshape(-1, self.d_model)
        if self.threshold is None:
            values, indices = topk_linear(flat, self.W_enc, self.latent_bias, self.k, relu=True)
        else:
            values, indices = self._largest_above_threshold(flat, self.threshold)
        shape = (*x_hat.shape[:-1], self.k)
        return values.view(shape), indices.view(shape)

    def _largest_above_threshold(self, flat: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """[n, d], [C] -> values, indices [n, k]; latents [n, C] exist for a chunk of rows at a time."""
        parts = []
        for rows in row_chunks(len(flat), 16 * self.n_latents, flat.device):  # latents, mask, product and selection
            latents = F.linear(flat[rows], self.W_enc, self.latent_bias)
            active = latents > threshold
            values, indices = stable_topk(latents.relu() * active, self.k)
            parts.append((values.to(torch.promote_types(values.dtype, torch.float32)), indices))
        values, indices = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(indices)

    def decode(self, values: Tensor, indices: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """Latents (values, indices [..., k]) -> reconstruction [..., d].

        In the normalised space; with `mean` and `std` ([..., 1], from `normalize`), in the space of the raw input.
        """
        flat_values = values.reshape(-1, values.shape[-1]).to(self.decoder.dtype)
        flat_indices = indices.reshape(-1, indices.shape[-1])
        summed = F.embedding_bag(flat_indices, self.decoder, per_sample_weights=flat_values, mode="sum")
        reconstruction = summed.view(*values.shape[:-1], self.d_model) + self.pre_bias
        return reconstruction if mean is None or std is None else reconstruction * std + mean

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [..., d] of raw activations x [..., d]."""
        x_hat, mean, std = self.normalize(x)
        return self.decode(*self.encode_normalized(x_hat), mean, std)

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over settings and numbers, whatever format or device they came from."""
        settings = (self.n_latents, self.d_model, self.k, self._plain_normalization())
        digest = hashlib.sha256(" ".join(map(str, settings)).encode())
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
            "normalize": self._plain_normalization(),
        }
        config |= {name: value for name, value in (("metrics", metrics), ("training", training)) if value is not None}
        with atomic_folder(folder) as aside:
            # Bytes first: safetensors' own writer reports a full disk as an error that is not an OSError.
            (aside / "sae.safetensors").write_bytes(to_safetensors(self._tensors()))
            write_own_json(aside / "config.json", config)
            write_manifest(aside)

    def _plain_normalization(self) -> bool | str:
        return _PLAIN_NAMES.get(self.normalization, self.normalization)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {"W_enc": self.W_enc, "latent_bias": self.latent_bias}
        tensors |= {"pre_bias": self.pre_bias, "decoder": self.decoder}
        if self.threshold is not None:
            tensors["threshold"] = self.threshold
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def load(cls, path, k: int | None = None) -> "SparseAutoencoder":
        """Read an SAE, on the CPU, in fp32.

        `path` is an OpenAI autoencoder file (`torch.save` of a dict; TopK or ReLU), a sparsify folder (TopK), a SAELens
        folder (topk, standard or jumprelu), or a folder that `save` wrote. Nothing is ever unpickled. At most `k`
        latents a token are kept; None: as many as a TopK SAE has itself, and 32 of a ReLU or JumpReLU one. Raises
        `CocomixError` for a missing path, an unknown format, a variant this class cannot represent, and broken or
        contradictory files.
        """
        path = Path(path)
        if not path.exists():
            raise CocomixError(f"no SAE at {path}: check teacher.sae, or train one with `cocomix sae`")
        settings = read_sae(path)
        own_k, n_latents = settings["k"], len(settings["W_enc"])
        if own_k is None:
            settings["k"] = min(DEFAULT_K, n_latents) if k is None else k
        elif k is not None and isinstance(own_k, int):
            settings["k"] = min(k, own_k)
        try:
            return cls(**settings)
        except CocomixError as error:
            raise CocomixError(f"{path}: {error}") from None


def _check_shapes(W_enc, latent_bias, pre_bias, decoder, threshold) -> None:
    tensors = {"W_enc": W_enc, "latent_bias": latent_bias, "pre_bias": pre_bias, "decoder": decoder}
    if threshold is not None:
        tensors["threshold"] = threshold
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    fits = W_enc.dim() == 2 and W_enc.shape == decoder.shape
    fits = fits and latent_bias.shape == W_enc.shape[:1] and pre_bias.shape == W_enc.shape[1:]
    fits = fits and (threshold is None or threshold.shape == W_enc.shape[:1])
    if not fits:
        raise CocomixError(
            f"the SAE's tensors contradict each other: {shapes}; expected W_enc and decoder [C, d], latent_bias and "
            "threshold [C] and pre_bias [d] with one C (latents) and one d (width); the file is damaged or of another "
            "kind"
        )


def _check_settings(k, n_latents: int, normalize) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n_latents:
        raise CocomixError(f"the SAE's k is {k!r}; it must be a whole number from 1 to its {n_latents} latents")
    if normalize not in (True, False, *NORMALIZATIONS):
        raise CocomixError(f"the SAE's input normalisation is {normalize!r}; known are {', '.join(NORMALIZATIONS)}")
