"""Concept labels: the SAE's latents that matter most at each token, which the student's concept head learns from."""

from typing import TYPE_CHECKING, Any

import numpy as np

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.methods import CONCEPT_LABELS, labels_name, predicts_concepts
from cocomix.core.shapes import TeacherShape
from cocomix.data.token_files import TokenFiles
from cocomix.teacher.label_cache import NONE, LabelCache
from cocomix.teacher.shard_cache import ShardCache
from cocomix.teacher.supervision_kind import Source, SupervisionKind, Teacher

if TYPE_CHECKING:
    import torch

    from cocomix.teacher.concept_teacher import ConceptTeacher


class ConceptLabels(SupervisionKind):
    """`concept_labels` int64 [B, T, K] in a batch: numbers of latents, -1 where there is none."""

    name = CONCEPT_LABELS
    cache_class = LabelCache
    teacher_settings = ("model", "sae")

    def is_wanted(self, config: Config) -> bool:
        """Where the student predicts concepts."""
        return predicts_concepts(config.model.mixing)

    def cache_folder(self, config: Config) -> str | None:
        """`concept_labels.cache`."""
        return config.concept_labels.cache

    def how_to_cache(self, config: Config) -> str:
        """It always can be."""
        return ", or set concept_labels.cache"

    def title(self, config: Config) -> str:
        """By the rule that picks them."""
        return labels_name(config.teacher.labels_by)

    def load_teacher(self, config: Config, vocab_size: int, device: "torch.device", model=None) -> Teacher:
        """Language model and SAE of the config's `teacher:` section."""
        from cocomix.teacher.concept_teacher import ConceptTeacher

        return ConceptTeacher.from_config(config.teacher, device, model)

    def teacher_shape(self, config: Config, n_embd: int, n_layer: int, vocab_size: int) -> TeacherShape:
        """A language model with an SAE of the student's concepts. Raises `CocomixError` where it lacks the block."""
        teacher = config.teacher
        if teacher.layer >= n_layer:
            raise CocomixError(f"teacher.layer is {teacher.layer} but the teacher has blocks 0 to {n_layer - 1}")
        return TeacherShape(n_embd, n_layer, teacher.layer, vocab_size, config.model.concept_dim, teacher.labels_by)

    def random_teacher(self, config: Config, vocab_size: int, model: Any) -> Teacher:
        """`model` with an SAE of the student's concepts."""
        import torch

        from cocomix.teacher.concept_teacher import ConceptTeacher
        from cocomix.teacher.sae import SparseAutoencoder

        width, latents = model.config.hidden_size, config.model.concept_dim
        with torch.device(model.device):
            encoder, decoder = (torch.randn(latents, width) * width**-0.5 for _ in range(2))
            sae = SparseAutoencoder(
                encoder, torch.zeros(latents), torch.zeros(width), decoder, config.model.concept_topk, normalize=True
            )
        teacher = config.teacher
        return ConceptTeacher(model, sae.to(model.dtype), teacher.layer, teacher.label_topk, teacher.labels_by)

    def random_source(self, config: Config, vocab_size: int) -> Source:
        """K random concepts a token."""
        return RandomLabels(config.model.concept_dim, config.data.seq_len, config.teacher.label_topk)

    def require_fit(self, config: Config, teacher: "ConceptTeacher") -> None:
        """The student needs a concept for each latent of the SAE."""
        n_latents = teacher.sae.n_latents
        if n_latents != config.model.concept_dim:
            raise CocomixError(f"model.concept_dim is {config.model.concept_dim} but the SAE has {n_latents} latents")

    def known_fingerprints(self, config: Config) -> dict[str, str]:
        """The block, the number of labels and the rule."""
        teacher = config.teacher
        return {"layer": str(teacher.layer), "label_topk": str(teacher.label_topk), "labels_by": teacher.labels_by}

    def cache_values(self, teacher: "ConceptTeacher", input_ids: "torch.Tensor") -> "torch.Tensor":
        """Labels [B, T, K] on the CPU."""
        return teacher.labels(input_ids).cpu()

    def as_source(self, config: Config, cache: LabelCache) -> Source:
        """With a check that the student has the concepts that the cache names."""
        return _StudentsLabels(cache, config.model.concept_dim)

    def start_cache(self, config: Config, tokens: TokenFiles, teacher: "ConceptTeacher") -> ShardCache:
        """As for any kind; refuses an SAE of more latents than the cache can number."""
        if teacher.sae.n_latents > NONE:
            raise CocomixError(
                f"teacher.sae has {teacher.sae.n_latents} latents, but a label cache numbers at most {NONE}: take an "
                "SAE with fewer"
            )
        return super().start_cache(config, tokens, teacher)

    def per_token(self, config: Config) -> int:
        """K."""
        return config.teacher.label_topk


class _StudentsLabels:
    """The labels of a cache for a student of `concept_dim` concepts."""

    def __init__(self, cache: LabelCache, concept_dim: int):
        self.cache, self.concept_dim, self.fingerprints = cache, concept_dim, cache.fingerprints
        self.flops_per_token = cache.flops_per_token

    def window(self, index: int) -> dict[str, np.ndarray]:
        """`concept_labels` int64 [T, K]. Raises `CocomixError` for a concept that the student lacks."""
        labels = self.cache.window(index)
        if labels.max() >= self.concept_dim:
            raise CocomixError(
                f"the label cache {self.cache.folder} names concept {labels.max()} but model.concept_dim is "
                f"{self.concept_dim}: set it to the number of the SAE's latents"
            )
        return {"concept_labels": labels}


class RandomLabels:
    """Labels as a full cache holds them: K distinct concepts at every token but the last, which has none."""

    def __init__(self, concept_dim: int, seq_len: int, label_topk: int):
        if label_topk > concept_dim:
            raise CocomixError(f"teacher.label_topk ({label_topk}) must be at most model.concept_dim ({concept_dim})")
        self.concept_dim, self.seq_len, self.label_topk = concept_dim, seq_len, label_topk
        self.fingerprints: dict[str, str] = {}
        self.flops_per_token: float | None = None

    def window(self, index: int) -> dict[str, np.ndarray]:
        """`concept_labels` int64 [T, K]."""
        draw = np.random.default_rng((1, index))
        first = draw.integers(self.concept_dim, size=(self.seq_len, 1))
        stride = draw.integers(1, self.concept_dim // self.label_topk + 1, size=(self.seq_len, 1))
        labels = (first + stride * np.arange(self.label_topk)) % self.concept_dim
        labels[-1] = -1
        return {"concept_labels": labels}
