"""Soft targets: the teacher's next-token distribution at each token, which the student's is drawn towards."""

from typing import TYPE_CHECKING, Any

import numpy as np

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.methods import SOFT_TARGETS, soft_targets_name
from cocomix.core.shapes import TeacherShape
from cocomix.teacher.soft_target_cache import SoftTargetCache
from cocomix.teacher.supervision_kind import Source, SupervisionKind, Teacher

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

    def how_to_cache(self, config: Config) -> str:
        """Whole distributions cannot be."""
        return ", or set distillation.cache" if config.distillation.top_k else ""

    def title(self, config: Config) -> str:
        """By how many tokens they keep."""
        return soft_targets_name(config.distillation.top_k)

    def load_teacher(self, config: Config, vocab_size: int, device: "torch.device", model=None) -> Teacher:
        """The language model of the config's `teacher:` section."""
        from cocomix.teacher.distillation import DistillationTeacher

        return DistillationTeacher.from_config(config, vocab_size, device, model)

    def teacher_shape(self, config: Config, n_embd: int, n_layer: int, vocab_size: int) -> TeacherShape:
        """A language model alone."""
        return TeacherShape(n_embd, n_layer, 0, vocab_size, 0, labels_by=None, soft_targets=True)

    def random_teacher(self, config: Config, vocab_size: int, model: Any) -> Teacher:
        """`model` itself."""
        from cocomix.teacher.distillation import DistillationTeacher

        return DistillationTeacher(model, vocab_size, config.distillation.top_k)

    def random_source(self, config: Config, vocab_size: int) -> Source:
        """J random tokens a token. Raises `CocomixError` for whole distributions."""
        if config.distillation.top_k is None:
            raise CocomixError(
                "whole distributions are never cached: profile --labels online alone, or set distillation.top_k"
            )
        return RandomSoftTargets(vocab_size, config.data.seq_len, config.distillation.top_k)

    def require_fit(self, config: Config, teacher: "DistillationTeacher") -> None:
        """Every student can learn from a teacher that knows the tokens."""

    def known_fingerprints(self, config: Config) -> dict[str, str]:
        """How many tokens they keep."""
        return {"top_k": str(config.distillation.top_k)}

    def cache_values(self, teacher: "DistillationTeacher", input_ids: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """What it adds to a batch."""
        return teacher.targets(input_ids)

    def cache_settings(self, vocab_size: int) -> dict[str, Any]:
        """How wide ids are."""
        return SoftTargetCache.of_vocabulary(vocab_size)

    def per_token(self, config: Config) -> int:
        """J; a config that names a cache has it."""
        assert config.distillation.top_k is not None
        return config.distillation.top_k


class RandomSoftTargets:
    """Soft targets as a cache holds them: J distinct ids with falling probabilities that add up to a half."""

    def __init__(self, vocab_size: int, seq_len: int, top_k: int):
        if top_k > vocab_size:
            raise CocomixError(f"distillation.top_k is {top_k} but the vocabulary has {vocab_size} tokens")
        self.vocab_size, self.seq_len, self.top_k = vocab_size, seq_len, top_k
        self.fingerprints: dict[str, str] = {}
        self.flops_per_token: float | None = None

    def window(self, index: int) -> dict[str, np.ndarray]:
        """`soft_target_ids` int64 and `soft_target_log_probs` float16, both [T, J]."""
        first = np.random.default_rng((2, index)).integers(self.vocab_size, size=(self.seq_len, 1))
        weights = 1 / np.arange(1, self.top_k + 1)
        log_probs = np.log(weights / weights.sum() / 2).astype(np.float16)
        return {
            "soft_target_ids": (first + np.arange(self.top_k)) % self.vocab_size,
            "soft_target_log_probs": np.tile(log_probs, (self.seq_len, 1)),
        }
