"""The frozen side: a causal language model and its SAE, which say which concepts matter at each token.

Shapes: B windows of T tokens, d width of the teacher, C latents, k active latents, K labels.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from cocomix.config import TeacherConfig
from cocomix.errors import CocomixError
from cocomix.flops import TeacherShape
from cocomix.kernels import concept_attribution, linear_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Windows in one pass through the teacher. A matrix product may round differently when its shape changes, so passes
# always have the same shape and labels depend on the window alone, not on the batch that it came in.
_WINDOWS_PER_PASS = {"cpu": 1, "cuda": 8}

# What some architectures do to their logits after the product with the head: Gemma 2, Granite, Cohere, Falcon-H1
_LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def load_language_model(path) -> nn.Module:
    """Load a causal language model (a transformers folder or hub name) in float32, frozen and in evaluation mode.

    Raises `CocomixError` where there is no such model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from cocomix import model as _  # noqa: F401  registers CoCoMix models, which serve as teachers too

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CocomixError(f"cannot load a causal language model from {path}: {reason}") from None
    return model.requires_grad_(False).eval()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the model's type, its parameters' names and their float32 values, hexadecimal."""
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
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


def check_layer(model: nn.Module, layer: int) -> None:
    """Raise `CocomixError` unless the model has a block `layer`."""
    n_layer = len(transformer_blocks(model))
    if not 0 <= layer < n_layer:
        raise CocomixError(f"teacher.layer is {layer} but the teacher has blocks 0 to {n_layer - 1}")


def check_head(model: nn.Module) -> None:
    """Raise `CocomixError` where logits are more than one product of the last hidden states with a matrix."""
    head = model.get_output_embeddings()
    rescaled = any(getattr(model.config, name, None) not in (None, 1.0) for name in _LOGIT_SETTINGS)
    if getattr(head, "bias", None) is not None or rescaled:
        raise CocomixError(
            f"a {model.config.model_type} teacher is not supported: its head is more than one matrix product"
        )


class _Reached(Exception):
    """Ends a forward pass once the wanted block has run."""


@torch.no_grad()
def residual_stream(model: nn.Module, layer: int, input_ids: torch.Tensor) -> torch.Tensor:
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


def require_context(model: nn.Module, length: int, what: str) -> None:
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


class ConceptTeacher:
    """A frozen language model with its SAE: concept labels by attribution, or by activation.

    `model` is a causal language model of transformers, `sae` a `SparseAutoencoder` for the output of its block
    `layer` (0-based), `label_topk` the number of labels a token (K). `labels_by` is "attribution" (what a latent does
    for the next token, the paper's way) or "activation" (how large it is). The model is frozen and put into evaluation
    mode. Raises `CocomixError` where block or widths do not fit.
    """

    def __init__(self, model: nn.Module, sae, layer: int, label_topk: int, labels_by: str = "attribution"):
        check_layer(model, layer)
        width = model.config.hidden_size
        if sae.d_model != width:
            raise CocomixError(
                f"the SAE reads vectors of {sae.d_model} but the teacher's residual stream has {width}: "
                "it was trained on another model"
            )
        if labels_by == "attribution":
            check_head(model)
        self.model = model.requires_grad_(False).eval()
        self.sae = sae.requires_grad_(False).eval()
        self.layer, self.label_topk, self.labels_by = layer, label_topk, labels_by
        self._block, self._head_weight = transformer_blocks(model)[layer], model.get_output_embeddings().weight

    @classmethod
    def from_config(cls, config: TeacherConfig, device: torch.device) -> "ConceptTeacher":
        """Load teacher and SAE as the config's `teacher:` section says. Raises `CocomixError` where it cannot."""
        from cocomix.sae import SparseAutoencoder

        for key in ("model", "sae"):
            if not getattr(config, key):
                raise CocomixError(f"concept labels need teacher.{key}: set it to a path")
        dtype = DTYPES[config.dtype]
        model = load_language_model(config.model).to(device, dtype)
        sae = SparseAutoencoder.load(config.sae, config.sae_k).to(device, dtype)
        return cls(model, sae, config.layer, config.label_topk, config.labels_by)

    @property
    def shape(self) -> TeacherShape:
        """What its arithmetic depends on."""
        config = self.model.config
        return TeacherShape(config.hidden_size, config.num_hidden_layers, self.layer, config.vocab_size,
                            self.sae.n_latents, self.labels_by)

    def fingerprints(self) -> dict[str, str]:
        """What labels depend on beside the tokens."""
        return {
            "teacher": fingerprint(self.model),
            "sae": self.sae.fingerprint(),
            "layer": str(self.layer),
            "label_topk": str(self.label_topk),
            "labels_by": self.labels_by,
            "dtype": str(self._head_weight.dtype).removeprefix("torch."),
        }

    def labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Concept labels of windows input_ids [B, T] -> [B, T, K] int64, largest attribution first, -1 filled.

        The gradient is that of the teacher's next-token cross-entropy within the window, so the last position has
        no label. By activation, the largest latents that are active, which the last position has too. Labels of a
        window do not depend on the batch around it. Raises `CocomixError` where the windows are longer than the
        teacher's context.
        """
        require_context(self.model, input_ids.shape[1], "labels")
        return fixed_passes(self._labels_of_pass, input_ids)

    def targets(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`labels` as an entry of a batch: `concept_labels`."""
        return {"concept_labels": self.labels(input_ids)}

    def _labels_of_pass(self, input_ids):
        if self.labels_by == "activation":
            return self._most_active(*self.sae.encode(residual_stream(self.model, self.layer, input_ids)))
        if input_ids.shape[1] < 2:
            return input_ids.new_full((*input_ids.shape, self.label_topk), -1)
        residual, gradient = self._residual_and_gradient(input_ids)
        values, indices = self.sae.encode(residual.flatten(0, 1))
        labels = concept_attribution(values, indices, gradient.flatten(0, 1), self.sae.decoder, self.label_topk)
        return labels.unflatten(0, input_ids.shape)

    def _most_active(self, values, indices):
        """values, indices [B, T, k], descending -> [B, T, K]."""
        labels = indices.masked_fill(values <= 0, -1)[..., : self.label_topk]
        return torch.nn.functional.pad(labels, (0, self.label_topk - labels.shape[-1]), value=-1)

    def _residual_and_gradient(self, input_ids):
        """Residual stream after the block and the gradient of the loss with respect to it, both [B, T, d].

        No parameter requires a gradient, so autograd records nothing before the hook and only activations after it.
        """
        found = []

        def hook(_module, _args, output):
            leaf = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
            found.append(leaf)
            return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

        handle = self._block.register_forward_hook(hook)
        try:
            with torch.enable_grad():
                hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
                loss = linear_cross_entropy(
                    hidden[:, :-1].flatten(0, 1), self._head_weight, input_ids[:, 1:].flatten()
                )
                (gradient,) = torch.autograd.grad(loss, found[0])
        finally:
            handle.remove()
        return found[0].detach(), gradient
