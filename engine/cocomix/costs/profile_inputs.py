"""What a profile's steps read: token files where there are some, else random tokens; random labels and soft targets;
teachers."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.methods import CONCEPT_LABELS, SOFT_TARGETS
from cocomix.core.shapes import StudentShape
from cocomix.costs.planner import make_job
from cocomix.data.token_files import TokenFiles
from cocomix.teacher.concept_labels import ConceptLabels
from cocomix.teacher.concept_teacher import ConceptTeacher
from cocomix.teacher.distillation import DistillationTeacher
from cocomix.teacher.language_model import DTYPES
from cocomix.teacher.sae import SparseAutoencoder
from cocomix.teacher.supervision import learns_from

_WINDOWS = 2**20  # of random tokens; they are made when they are read
_GPT2_VOCABULARY, _GPT2_CONTEXT = 50257, 1024  # GPT-2 124M, the paper's teacher


class RandomTokens:
    """Windows of uniform random ids; stands in for a `TokenSplit`."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def n_windows(self, _seq_len: int) -> int:
        """As many as any profile reads."""
        return _WINDOWS

    def window(self, index: int, seq_len: int) -> np.ndarray:
        """int64 [seq_len], always the same for an index."""
        return np.random.default_rng(index).integers(self.vocab_size, size=seq_len)


class RandomLabels:
    """Labels as a full cache holds them: K distinct concepts at every token but the last, which has none."""

    def __init__(self, concept_dim: int, seq_len: int, label_topk: int):
        if label_topk > concept_dim:
            raise CocomixError(f"teacher.label_topk ({label_topk}) must be at most model.concept_dim ({concept_dim})")
        self.concept_dim, self.seq_len, self.label_topk = concept_dim, seq_len, label_topk

    def window(self, index: int) -> dict[str, np.ndarray]:
        """`concept_labels` int64 [T, K]."""
        draw = np.random.default_rng((1, index))
        first = draw.integers(self.concept_dim, size=(self.seq_len, 1))
        stride = draw.integers(1, self.concept_dim // self.label_topk + 1, size=(self.seq_len, 1))
        labels = (first + stride * np.arange(self.label_topk)) % self.concept_dim
        labels[-1] = -1
        return {"concept_labels": labels}


class RandomSoftTargets:
    """Soft targets as a cache holds them: J distinct ids with falling probabilities that add up to a half."""

    def __init__(self, vocab_size: int, seq_len: int, top_k: int):
        if top_k > vocab_size:
            raise CocomixError(f"distillation.top_k is {top_k} but the vocabulary has {vocab_size} tokens")
        self.vocab_size, self.seq_len, self.top_k = vocab_size, seq_len, top_k

    def window(self, index: int) -> dict[str, np.ndarray]:
        """`soft_target_ids` int64 and `soft_target_log_probs` float16, both [T, J]."""
        first = np.random.default_rng((2, index)).integers(self.vocab_size, size=(self.seq_len, 1))
        weights = 1 / np.arange(1, self.top_k + 1)
        log_probs = np.log(weights / weights.sum() / 2).astype(np.float16)
        return {
            "soft_target_ids": (first + np.arange(self.top_k)) % self.vocab_size,
            "soft_target_log_probs": np.tile(log_probs, (self.seq_len, 1)),
        }


def open_tokens(config: Config, vocab_size: int | None):
    """The training tokens and the size of their vocabulary.

    Token files are taken where data.folder has some and no `vocab_size` is given. Raises `CocomixError` where they are
    damaged, and where nothing tells the vocabulary.
    """
    if vocab_size is None and (Path(config.data.folder) / "meta.json").is_file():
        tokens = TokenFiles.open(config.data.folder)
        return tokens.split("train"), tokens.vocab_size
    shape = student_shape(config, vocab_size)
    return RandomTokens(shape.vocab_size), shape.vocab_size


def baseline(config: Config) -> Config:
    """The config of next-token prediction, which needs no teacher."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mixing="none"),
        distillation=dataclasses.replace(config.distillation, weight=0.0),
    )


def student_shape(config: Config, vocab_size: int | None) -> StudentShape:
    """The shape of the config's student. Raises `CocomixError` where nothing tells the vocabulary."""
    shape = make_job(baseline(config), None, vocab_size).shape  # the teacher's shape is not wanted here
    return dataclasses.replace(shape, mixing=config.model.mixing)


def random_caches(config: Config, vocab_size: int) -> dict:
    """What caches would hold for the config's student, at random."""
    length, made = config.data.seq_len, {}
    if CONCEPT_LABELS in learns_from(config):
        made[CONCEPT_LABELS] = RandomLabels(config.model.concept_dim, length, config.teacher.label_topk)
    if SOFT_TARGETS in learns_from(config):
        if config.distillation.top_k is None:
            raise CocomixError(
                "whole distributions are never cached: profile --labels online alone, or set distillation.top_k"
            )
        made[SOFT_TARGETS] = RandomSoftTargets(vocab_size, length, config.distillation.top_k)
    return made


def build_teachers(config: Config, device: torch.device, vocab_size: int, at_random: bool) -> dict:
    """The teachers of all that the config's student needs, which share one language model.

    They are the config's; or one of GPT-2 124M's shape with `concept_dim` latents and random weights, on which the
    arithmetic does not depend. Raises `CocomixError` where they cannot be loaded or do not fit the student.
    """
    made, model = {}, None
    if CONCEPT_LABELS in learns_from(config):
        made[CONCEPT_LABELS] = (
            _random_teacher(config, device, vocab_size)
            if at_random
            else ConceptTeacher.from_config(config.teacher, device)
        )
        ConceptLabels().require_fit(config, made[CONCEPT_LABELS])
        model = made[CONCEPT_LABELS].model
    if SOFT_TARGETS in learns_from(config):
        if model is None and at_random:
            model = _random_gpt2(config, device, vocab_size)
        made[SOFT_TARGETS] = DistillationTeacher.from_config(config, vocab_size, device, model)
    for teacher in made.values():
        if teacher.model.config.vocab_size < vocab_size:
            raise CocomixError(
                f"the teacher knows {teacher.model.config.vocab_size} ids but the tokens use {vocab_size}"
            )
    return made


def _random_gpt2(config, device, vocab_size):
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device(device):
        torch.manual_seed(config.train.seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=max(_GPT2_VOCABULARY, vocab_size),
                n_positions=max(_GPT2_CONTEXT, config.data.seq_len),
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    return model.to(DTYPES[config.teacher.dtype])


def _random_teacher(config, device, vocab_size):
    model, latents = _random_gpt2(config, device, vocab_size), config.model.concept_dim
    with torch.device(device):
        width = model.config.n_embd
        encoder, decoder = (torch.randn(latents, width) * width**-0.5 for _ in range(2))
        sae = SparseAutoencoder(
            encoder, torch.zeros(latents), torch.zeros(width), decoder, config.model.concept_topk, normalize=True
        )
    return ConceptTeacher(
        model,
        sae.to(DTYPES[config.teacher.dtype]),
        config.teacher.layer,
        config.teacher.label_topk,
        config.teacher.labels_by,
    )
