"""The frozen side: a causal language model and its SAE, which say which concepts matter at each token.

Shapes: B windows of T tokens, d width of the teacher, C latents, k active latents, K labels.
"""

from typing import TYPE_CHECKING, Any, cast

import torch

from cocomix.core.config import TeacherConfig
from cocomix.core.errors import CocomixError
from cocomix.core.shapes import TeacherShape
from cocomix.model.pretrained import fingerprint, load_language_model
from cocomix.teacher.language_model import (
    check_head,
    check_layer,
    fixed_passes,
    head_weight,
    require_context,
    residual_stream,
    teacher_dtype,
    transformer_blocks,
)
from cocomix_kernels import concept_attribution, linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ConceptTeacher:
    """A frozen language model with its SAE: concept labels by attribution, or by activation.

    `model` is a causal language model of transformers, `sae` a `SparseAutoencoder` for the output of its block
    `layer` (0-based), `label_topk` the number of labels a token (K). `labels_by` is "attribution" (what a latent does
    for the next token, the paper's way) or "activation" (how large it is). The model is frozen and put into evaluation
    mode. Raises `CocomixError` where block or widths do not fit.
    """

    def __init__(self, model: "PreTrainedModel", sae, layer: int, label_topk: int, labels_by: str = "attribution"):
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
        self._block, self._head_weight = transformer_blocks(model)[layer], head_weight(model)

    @classmethod
    def from_config(
        cls, config: TeacherConfig, device: torch.device, model: "PreTrainedModel | None" = None
    ) -> "ConceptTeacher":
        """Load teacher and SAE as the config's `teacher:` section says; the language model may be there already.
        Raises `CocomixError` where it cannot."""
        from cocomix.teacher.sae import SparseAutoencoder

        for key in ("model", "sae"):
            if not getattr(config, key):
                raise CocomixError(f"concept labels need teacher.{key}: set it to a path")
        dtype = teacher_dtype(config.dtype, device)
        if model is None:
            model = load_language_model(config.model)
            cast(Any, model).to(device, dtype)  # in place
        sae = SparseAutoencoder.load(config.sae, config.sae_k).to(device, dtype)
        return cls(model, sae, config.layer, config.label_topk, config.labels_by)

    @property
    def shape(self) -> TeacherShape:
        """What its arithmetic depends on."""
        config = self.model.config
        return TeacherShape(
            config.hidden_size,
            config.num_hidden_layers,
            self.layer,
            config.vocab_size,
            self.sae.n_latents,
            self.labels_by,
        )

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
                loss = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), self._head_weight, input_ids[:, 1:].flatten())
                (gradient,) = torch.autograd.grad(loss, found[0])
        finally:
            handle.remove()
        return found[0].detach(), gradient
