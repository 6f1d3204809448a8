"""Soft targets: the teacher's next-token distribution at each token, which the student's is drawn towards."""

from typing import TYPE_CHECKING

from cocomix.core.config import Config
from cocomix.core.methods import SOFT_TARGETS, soft_targets_name
from cocomix.data.token_files import TokenFiles
from cocomix.teacher.soft_target_cache import SoftTargetCache
from cocomix.teacher.supervision_kind import SupervisionKind, Teacher

if TYPE_CHECKING:
    import torch

    from cocomix.teacher.distillation import DistillationTeacher


class SoftTargets(SupervisionKind):
    """`soft_target_ids` and `soft_target_log_probs` [B, T, J] in a batch; of whole distributions, which are never
    cached, `teacher_hidden` [B, T, d] and `teacher_head` [V, d]."""

    name = SOFT_TARGETS
    cache_class = SoftTargetCache
    teacher_settings = ("model",)

    def is_wanted(self, config: Config) -> bool:
        """Where distillation has a weight."""
        return config.distillation.weight > 0

    def cache_folder(self, config: Config) -> str | None:
        """`distillation.cache`."""
        return config.distillation.cache

    def title(self, config: Config) -> str:
        """By how many tokens they keep."""
        return soft_targets_name(config.distillation.top_k)

    def make_teacher(self, config: Config, tokens: TokenFiles, device: "torch.device", model=None) -> Teacher:
        """The language model of the config's `teacher:` section."""
        from cocomix.teacher.distillation import DistillationTeacher
        from cocomix.teacher.language_model import require_vocabulary

        teacher = DistillationTeacher.from_config(config, tokens.vocab_size, device, model)
        require_vocabulary(teacher.model, tokens)
        return teacher

    def require_fit(self, config: Config, teacher: "DistillationTeacher") -> None:
        """Every student can learn from a teacher that knows the tokens."""

    def known_fingerprints(self, config: Config) -> dict[str, str]:
        """How many tokens they keep."""
        return {"top_k": str(config.distillation.top_k)}

    def cache_values(self, teacher: "DistillationTeacher", input_ids: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """What it adds to a batch."""
        return teacher.targets(input_ids)

    def per_token(self, config: Config) -> int:
        """J; a config that names a cache has it."""
        assert config.distillation.top_k is not None
        return config.distillation.top_k
