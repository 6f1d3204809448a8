"""The teacher of knowledge distillation: its next-token distribution, whole or of its likeliest tokens.

J is the number of likeliest tokens that soft targets keep; the rest of the vocabulary counts as one token.
"""

from typing import TYPE_CHECKING, Any, cast

import torch

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.shapes import TeacherShape
from cocomix.model.pretrained import fingerprint, load_language_model
from cocomix.teacher.language_model import check_head, fixed_passes, head_weight, require_context, teacher_dtype
from cocomix_kernels import top_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DistillationTeacher:
    """A frozen language model whose next-token distribution a student learns from.

    `model` is a causal language model of transformers, of whose vocabulary the first `vocab_size` ids count (others
    pad it). `top_k` is J, or None for the whole distribution. The model is frozen and put into evaluation mode.
    Raises `CocomixError` where its logits are more than one matrix product, and where `top_k` exceeds the vocabulary.
    """

    def __init__(self, model: "PreTrainedModel", vocab_size: int, top_k: int | None):
        check_head(model)
        if top_k is not None and top_k > vocab_size:
            raise CocomixError(f"distillation.top_k is {top_k} but the vocabulary has {vocab_size} tokens")
        self.model = model.requires_grad_(False).eval()
        self.vocab_size, self.top_k = vocab_size, top_k
        self._head = head_weight(model)

    @classmethod
    def from_config(
        cls, config: Config, vocab_size: int, device: torch.device, model: "PreTrainedModel | None" = None
    ) -> "DistillationTeacher":
        """Teacher of a config, whose language model may be there already. Raises `CocomixError` where it cannot be
        loaded."""
        if model is None:
            if not config.teacher.model:
                raise CocomixError("distillation needs teacher.model: set it to a path")
            model = load_language_model(config.teacher.model)
            cast(Any, model).to(device, teacher_dtype(config.teacher.dtype, device))  # in place
        return cls(model, vocab_size, config.distillation.top_k)

    @property
    def shape(self) -> TeacherShape:
        """What its arithmetic depends on."""
        config = self.model.config
        return TeacherShape(
            config.hidden_size, config.num_hidden_layers, 0, config.vocab_size, 0, labels_by=None, soft_targets=True
        )

    def fingerprints(self) -> dict[str, str]:
        """What soft targets depend on beside the tokens."""
        return {
            "teacher": fingerprint(self.model),
            "top_k": str(self.top_k),
            "dtype": str(self._head.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def targets(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a batch of windows input_ids [B, T] needs for distillation, on the same device.

        With `top_k`: `soft_target_ids` int64 and `soft_target_log_probs` float16, both [B, T, J], likeliest first.
        Without: `teacher_hidden` [B, T, d], the last hidden states, and `teacher_head` [V, d], whose product the
        logits are. Targets of a window do not depend on the batch around it. Raises `CocomixError` where the windows
        are longer than the teacher's context.
        """
        require_context(self.model, input_ids.shape[1], "soft targets")
        if self.top_k is None:
            return {"teacher_hidden": fixed_passes(self._hidden, input_ids), "teacher_head": self._head}
        ids, log_probs = fixed_passes(self._likeliest, input_ids).chunk(2, dim=-1)
        return {"soft_target_ids": ids.long(), "soft_target_log_probs": log_probs.to(torch.float16)}

    def _hidden(self, input_ids):
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def _likeliest(self, input_ids):
        """Ids and log-probabilities side by side, float32 [B, T, 2 J]: a float32 holds every id exactly."""
        hidden = self._hidden(input_ids).flatten(0, 1)
        ids, log_probs = top_targets(hidden, self._head[: self.vocab_size], cast(int, self.top_k))
        return torch.cat([ids.float(), log_probs.float()], dim=-1).unflatten(0, input_ids.shape)
