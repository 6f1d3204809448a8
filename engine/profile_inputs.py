"""What a profile's steps read: token files where there are some, else random tokens; random labels; a teacher."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from cocomix.config import Config
from cocomix.data import TokenFiles
from cocomix.errors import CocomixError
from cocomix.flops import StudentShape, TeacherShape
from cocomix.planner import make_job
from cocomix.sae import SparseAutoencoder
from cocomix.teacher import DTYPES, ConceptTeacher

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

    def window(self, index: int) -> np.ndarray:
        """int64 [T, K]."""
        draw = np.random.default_rng((1, index))
        first = draw.integers(self.concept_dim, size=(self.seq_len, 1))
        stride = draw.integers(1, self.concept_dim // self.label_topk + 1, size=(self.seq_len, 1))
        labels = (first + stride * np.arange(self.label_topk)) % self.concept_dim
        labels[-1] = -1
        return labels


class Labels:
    """Where a mode's labels come from: nowhere (`kind` None), its batches ("cached"), or a teacher ("online")."""

    def __init__(self, kind: str | None, teacher=None):
        self.kind, self.teacher = kind, teacher

    def add_to(self, batch: dict) -> None:
        """Put `concept_labels` [B, T, K] into a batch where a teacher makes them."""
        if self.teacher is not None:
            batch["concept_labels"] = self.teacher.labels(batch["input_ids"])


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


def student_shape(config: Config, vocab_size: int | None) -> StudentShape:
    """The shape of the config's student. Raises `CocomixError` where nothing tells the vocabulary."""
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, mixing="none"))
    shape = make_job(plain, None, vocab_size).shape  # plain: the teacher's shape is not wanted here
    return dataclasses.replace(shape, mixing=config.model.mixing)


def build_teacher(config: Config, device: torch.device, vocab_size: int, at_random: bool) -> ConceptTeacher:
    """The config's teacher; or one of GPT-2 124M's shape with `concept_dim` latents and random weights, on which the
    arithmetic does not depend. Raises `CocomixError` where it cannot be loaded or does not fit the student."""
    teacher = _random_teacher(config, device, vocab_size) if at_random else ConceptTeacher.from_config(
        config.teacher, device)
    knows, latents = teacher.model.config.vocab_size, teacher.sae.n_latents
    if knows < vocab_size:
        raise CocomixError(f"the teacher knows {knows} ids but the tokens use {vocab_size}")
    if latents != config.model.concept_dim:
        raise CocomixError(f"model.concept_dim is {config.model.concept_dim} but the SAE has {latents} latents")
    return teacher


def _random_teacher(config, device, vocab_size):
    from transformers import GPT2Config, GPT2LMHeadModel

    dtype, latents = DTYPES[config.teacher.dtype], config.model.concept_dim
    with torch.device(device):
        torch.manual_seed(config.train.seed)
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=max(_GPT2_VOCABULARY, vocab_size), n_positions=max(_GPT2_CONTEXT, config.data.seq_len),
            bos_token_id=None, eos_token_id=None))
        width = model.config.n_embd
        encoder, decoder = (torch.randn(latents, width) * width**-0.5 for _ in range(2))
        sae = SparseAutoencoder(encoder, torch.zeros(latents), torch.zeros(width), decoder, config.model.concept_topk,
                                normalize=True)
    return ConceptTeacher(model.to(dtype), sae.to(dtype), config.teacher.layer, config.teacher.label_topk)


def teacher_shape(teacher: ConceptTeacher) -> TeacherShape:
    """The shape that the teacher's arithmetic follows from."""
    config = teacher.model.config
    return TeacherShape(config.hidden_size, config.num_hidden_layers, teacher.layer, config.vocab_size,
                        teacher.sae.n_latents)
