"""What a student learns from beside the tokens, from caches or from the teacher: the list of its kinds, and what a
training run has of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cocomix.core.config import Config
from cocomix.core.flops import teacher_flops
from cocomix.core.shapes import TeacherShape
from cocomix.data.token_files import TokenFiles
from cocomix.teacher.concept_labels import ConceptLabels
from cocomix.teacher.soft_targets import SoftTargets
from cocomix.teacher.supervision_kind import Source, SupervisionKind, Teacher

if TYPE_CHECKING:
    import torch

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # by PyTorch's names, which caches keep

KINDS: tuple[SupervisionKind, ...] = (ConceptLabels(), SoftTargets())


def wanted_kinds(config: Config) -> tuple[SupervisionKind, ...]:
    """The kinds that the config's student learns from."""
    return tuple(kind for kind in KINDS if kind.is_wanted(config))


def learns_from(config: Config) -> tuple[str, ...]:
    """The names of the kinds that the config's student learns from."""
    return tuple(kind.name for kind in wanted_kinds(config))


def cached_precision(config: Config, kinds: Sequence[SupervisionKind]) -> dict[str, str]:
    """{"teacher.dtype": the precision of the teacher that the caches of `kinds` are from}, where there is one."""
    for kind in kinds:
        folder = kind.cache_folder(config)
        if folder and (Path(folder) / "meta.json").is_file():
            dtype = kind.cache_class.open(folder).fingerprints.get("dtype")
            if dtype in _PRECISIONS:
                return {"teacher.dtype": _PRECISIONS[dtype]}
    return {}


class Supervision:
    """What a student needs beside its tokens, by the names of its kinds: read from `caches`, or made by `teachers`.

    A cache has `.window(index)`, a teacher `.targets(input_ids)`; both return entries of a batch.
    """

    def __init__(self, caches: Mapping[str, Source] | None = None, teachers: Mapping[str, Teacher] | None = None):
        self.caches, self.teachers = dict(caches or {}), dict(teachers or {})

    @classmethod
    def from_config(cls, config: Config, tokens: TokenFiles, device: "torch.device") -> "Supervision":
        """What the config's student needs. Raises `CocomixError` where it is not there, incomplete or of something
        else."""
        caches, teachers, model = {}, {}, None
        for kind in wanted_kinds(config):
            if kind.cache_folder(config):
                caches[kind.name] = kind.open_cache(config, tokens)
            else:
                teacher = teachers[kind.name] = kind.make_teacher(config, tokens, device, model)
                kind.require_fit(config, teacher)
                model = teacher.model
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

    def add_to(self, batch: "dict[str, torch.Tensor]") -> None:
        """Put what the teachers make of `input_ids` [B, T] into a batch."""
        for teacher in self.teachers.values():
            batch |= teacher.targets(batch["input_ids"])

    def fingerprints(self) -> dict[str, str]:
        """What it depends on, by names for people."""
        found = {name: cache.fingerprints for name, cache in self.caches.items()}
        found |= {name: teacher.fingerprints() for name, teacher in self.teachers.items()}
        return {f"the {name}' {key}": value for name, prints in found.items() for key, value in prints.items()}

    def flops_per_token(self, seq_len: int) -> float | None:
        """Floating-point operations a token of making it, whether now or before; None where a cache does not tell."""
        online = teacher_flops(self.teacher_shape, seq_len) if self.teacher_shape is not None else 0
        of_caches = [cache.flops_per_token for cache in self.caches.values()]
        return None if None in of_caches else online + sum(cost for cost in of_caches if cost is not None)

    def of(self, name: str) -> "Supervision":
        """The part of it that is called `name`, alone."""
        caches = {key: cache for key, cache in self.caches.items() if key == name}
        return Supervision(caches, {key: teacher for key, teacher in self.teachers.items() if key == name})

    @property
    def teacher_shape(self) -> TeacherShape | None:
        """What the online work's arithmetic depends on; None where there is none."""
        return teacher_shape(self.teachers)


def teacher_shape(teachers: Mapping[str, Teacher]) -> TeacherShape | None:
    """The shape of all `teachers`' work together; None where there are none."""
    return joint_shape([teacher.shape for teacher in teachers.values()])


def joint_shape(shapes: list[TeacherShape]) -> TeacherShape | None:
    """The shape of the work of teachers that share one language model; None where there are none."""
    if not shapes:
        return None
    labelling = [shape for shape in shapes if shape.labels_by is not None]
    return dataclasses.replace((labelling or shapes)[0], soft_targets=any(shape.soft_targets for shape in shapes))
