"""What a student learns from beside the tokens: concept labels and soft targets, from caches or from the teacher."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.methods import LABELS, SOFT_TARGETS
from cocomix.core.shapes import TeacherShape
from cocomix.data.token_files import TokenFiles
from cocomix.distributed.ranks import rank_and_world
from cocomix.teacher.concept_teacher import ConceptTeacher
from cocomix.teacher.distillation import DistillationTeacher, SoftTargetCache
from cocomix.teacher.label_cache import LabelCache
from cocomix.teacher.shard_cache import ShardCache


class Supervision:
    """What a student needs beside its tokens, by name (`LABELS`, `SOFT_TARGETS`): read from `caches`, or made by
    `teachers`.

    A cache has `.window(index)`, a teacher `.targets(input_ids)`; both return entries of a batch.
    """

    def __init__(self, caches: Mapping | None = None, teachers: Mapping | None = None):
        self.caches, self.teachers = dict(caches or {}), dict(teachers or {})

    @classmethod
    def from_config(cls, config: Config, tokens: TokenFiles, device: torch.device) -> "Supervision":
        """What the config's student needs. Raises `CocomixError` where it is not there, incomplete or of something
        else."""
        caches, teachers = {}, {}
        if LABELS in config.learns_from:
            if config.concept_labels.cache:
                caches[LABELS] = _StudentsLabels(_open_labels(config, tokens), config.model.concept_dim)
            else:
                teachers[LABELS] = _concept_teacher(config, tokens, device)
        if SOFT_TARGETS in config.learns_from:
            if config.distillation.cache:
                caches[SOFT_TARGETS] = _open_soft_targets(config, tokens)
            else:
                teachers[SOFT_TARGETS] = distillation_teacher(config, tokens, device, teachers.get(LABELS))
        return cls(caches, teachers)

    def kind(self, name: str) -> str | None:
        """Where `name` comes from: "cached", "online", or None for nowhere."""
        return "cached" if name in self.caches else "online" if name in self.teachers else None

    def window(self, index: int) -> dict[str, np.ndarray]:
        """What the caches hold for a window, as entries of a batch."""
        entries = {}
        for cache in self.caches.values():
            entries |= cache.window(index)
        return entries

    def add_to(self, batch: dict[str, torch.Tensor]) -> None:
        """Put what the teachers make of `input_ids` [B, T] into a batch."""
        for teacher in self.teachers.values():
            batch |= teacher.targets(batch["input_ids"])

    def fingerprints(self) -> dict[str, str]:
        """What it depends on, by names for people."""
        found = {name: cache.fingerprints for name, cache in self.caches.items()}
        found |= {name: teacher.fingerprints() for name, teacher in self.teachers.items()}
        return {f"the {name}' {key}": value for name, prints in found.items() for key, value in prints.items()}

    def of(self, name: str) -> "Supervision":
        """The part of it that is called `name`, alone."""
        return Supervision(
            *(
                {key: source for key, source in sources.items() if key == name}
                for sources in (self.caches, self.teachers)
            )
        )

    @property
    def teacher_shape(self) -> TeacherShape | None:
        """What the online work's arithmetic depends on; None where there is none."""
        return teacher_shape(self.teachers)


def teacher_shape(teachers: Mapping) -> TeacherShape | None:
    """The shape of all `teachers`' work together; None where there are none."""
    shapes = [teacher.shape for teacher in teachers.values()]
    if not shapes:
        return None
    return dataclasses.replace(shapes[0], soft_targets=SOFT_TARGETS in teachers)


class _StudentsLabels:
    """The labels of a cache for a student of `concept_dim` concepts."""

    def __init__(self, cache: LabelCache, concept_dim: int):
        self.cache, self.concept_dim, self.fingerprints = cache, concept_dim, cache.fingerprints

    def window(self, index: int) -> dict[str, np.ndarray]:
        """`concept_labels` int64 [T, K]. Raises `CocomixError` for a concept that the student lacks."""
        labels = self.cache.window(index)
        if labels.max() >= self.concept_dim:
            raise CocomixError(
                f"the label cache {self.cache.folder} names concept {labels.max()} but model.concept_dim is "
                f"{self.concept_dim}: set it to the number of the SAE's latents"
            )
        return {"concept_labels": labels}


def _concept_teacher(config, tokens, device):
    teacher = ConceptTeacher.from_config(config.teacher, device)
    require_vocabulary(teacher.model, tokens)
    require_concepts(config, teacher)
    return teacher


def distillation_teacher(
    config: Config, tokens: TokenFiles, device: torch.device, other: ConceptTeacher | None = None
) -> DistillationTeacher:
    """The config's teacher of soft targets, which shares the language model of `other`. Raises `CocomixError` where it
    cannot be loaded or does not know the tokens."""
    model = None if other is None else other.model
    teacher = DistillationTeacher.from_config(config, tokens.vocab_size, device, model)
    require_vocabulary(teacher.model, tokens)
    return teacher


def _open_labels(config, tokens):
    section = config.teacher

    def made_by():
        teacher = ConceptTeacher.from_config(section, torch.device("cpu"))
        require_concepts(config, teacher)
        return teacher.fingerprints()

    known = {"layer": str(section.layer), "label_topk": str(section.label_topk), "labels_by": section.labels_by}
    return _open_checked(
        LabelCache.open(config.concept_labels.cache),
        config,
        tokens,
        known,
        made_by if section.model and section.sae else None,
    )


def _open_soft_targets(config, tokens):
    def made_by():
        return DistillationTeacher.from_config(config, tokens.vocab_size, torch.device("cpu")).fingerprints()

    return _open_checked(
        SoftTargetCache.open(config.distillation.cache),
        config,
        tokens,
        {"top_k": str(config.distillation.top_k)},
        made_by if config.teacher.model else None,
    )


def _open_checked(cache: ShardCache, config, tokens, known, made_by):
    """The cache of a training run, checked. The ranks share the looks at its shards, and the first one alone loads the
    teacher (`made_by`): hundreds of copies of it would come from the same disk."""
    rank, world = rank_and_world()
    expected = data_fingerprints(config, tokens) | known
    if rank == 0 and made_by is not None:
        expected |= made_by()
    cache.require(expected)
    cache.require_complete(rank, world)
    return cache


def data_fingerprints(config: Config, tokens: TokenFiles) -> dict[str, str]:
    """The part of a cache's fingerprints that the token files and the window length decide."""
    return {"data": tokens.split("train").fingerprint, "seq_len": str(config.data.seq_len)}


def require_concepts(config: Config, teacher: ConceptTeacher) -> None:
    """Raise `CocomixError` unless the student has a concept for each latent of the teacher's SAE."""
    n_latents = teacher.sae.n_latents
    if n_latents != config.model.concept_dim:
        raise CocomixError(f"model.concept_dim is {config.model.concept_dim} but the SAE has {n_latents} latents")


def require_vocabulary(model, tokens: TokenFiles) -> None:
    """Raise `CocomixError` unless the model's vocabulary covers the token files'."""
    if model.config.vocab_size < tokens.vocab_size:
        raise CocomixError(
            f"the token files in {tokens.folder} use {tokens.vocab_size} ids but the model knows "
            f"{model.config.vocab_size}: it was made for another tokenizer"
        )
