"""What a profile's steps read: token files where there are some, else random tokens; random caches; teachers."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.costs.planner import known_vocabulary
from cocomix.data.token_files import TokenFiles
from cocomix.teacher.language_model import DTYPES
from cocomix.teacher.supervision import wanted_kinds
from cocomix.teacher.supervision_kind import Source, Teacher

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


def open_tokens(config: Config, vocab_size: int | None):
    """The training tokens and the size of their vocabulary.

    Token files are taken where data.folder has some and no `vocab_size` is given. Raises `CocomixError` where they are
    damaged, and where nothing tells the vocabulary.
    """
    if vocab_size is None and (Path(config.data.folder) / "meta.json").is_file():
        tokens = TokenFiles.open(config.data.folder)
        return tokens.split("train"), tokens.vocab_size
    vocab_size = vocab_size or known_vocabulary(config)
    return RandomTokens(vocab_size), vocab_size


def baseline(config: Config) -> Config:
    """The config of next-token prediction, which needs no teacher."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mixing="none"),
        distillation=dataclasses.replace(config.distillation, weight=0.0),
    )


def random_caches(config: Config, vocab_size: int) -> dict[str, Source]:
    """What caches would hold for the config's student, at random."""
    return {kind.name: kind.random_source(config, vocab_size) for kind in wanted_kinds(config)}


def build_teachers(config: Config, device: torch.device, vocab_size: int, at_random: bool) -> dict[str, Teacher]:
    """The teachers of all that the config's student needs, which share one language model.

    They are the config's; or one of GPT-2 124M's shape (of the student's, where that teaches itself) with `concept_dim`
    latents and random weights, on which the arithmetic does not depend. Raises `CocomixError` where they cannot be
    loaded or do not fit the student.
    """
    made: dict[str, Teacher] = {}
    model = _random_gpt2(config, device, vocab_size) if at_random else None
    for kind in wanted_kinds(config):
        if at_random:
            teacher = kind.random_teacher(config, vocab_size, model)
        else:
            teacher = kind.load_teacher(config, vocab_size, device, model)
        kind.require_fit(config, teacher)
        made[kind.name], model = teacher, teacher.model
        if model.config.vocab_size < vocab_size:
            raise CocomixError(f"the teacher knows {model.config.vocab_size} ids but the tokens use {vocab_size}")
    return made


def _random_gpt2(config, device, vocab_size):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {
        "vocab_size": max(_GPT2_VOCABULARY, vocab_size),
        "n_positions": max(_GPT2_CONTEXT, config.data.seq_len),
    }
    if config.teacher.self_taught_after:
        blocks = {name: getattr(config.model, name) for name in ("n_embd", "n_layer", "n_head")}
        shape = {"vocab_size": vocab_size, "n_positions": config.data.seq_len, **blocks}
    with torch.device(device):
        torch.manual_seed(config.train.seed)
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
    return cast(Any, model).to(DTYPES[config.teacher.dtype])
