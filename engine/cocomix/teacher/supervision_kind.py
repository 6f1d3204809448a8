"""What every kind of supervision has: something that a student learns from beside its tokens, which a frozen teacher
makes while training or has left in a cache.

A kind is a subclass in a file of its own, and stands in the list of supervision.py. Nothing here loads PyTorch before a
teacher is wanted, so that plans need not wait for it.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cocomix.core.config import Config
from cocomix.core.flops import teacher_flops
from cocomix.core.shapes import TeacherShape
from cocomix.data.token_files import TokenFiles
from cocomix.teacher.shard_cache import ShardCache

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """Where training reads a supervision that is cached."""

    fingerprints: dict[str, str]
    flops_per_token: float | None  # of making it; None where that is not known

    def window(self, index: int) -> dict[str, np.ndarray]:
        """What there is for a window, as entries of a batch."""
        ...


class Teacher(Protocol):
    """What makes a supervision."""

    model: Any  # the language model, which the teachers of other kinds can share

    @property
    def shape(self) -> TeacherShape:
        """What its arithmetic depends on."""
        ...

    def targets(self, input_ids: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """What it says of windows [B, T], as entries of a batch."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """What that depends on beside the tokens."""
        ...


class SupervisionKind(ABC):
    """One kind of supervision: what the config says of it, its teacher and its cache."""

    name: str  # in messages and in stored fingerprints
    cache_class: type[ShardCache]
    teacher_settings: tuple[str, ...]  # of the section `teacher:`, without which there is no teacher

    @abstractmethod
    def is_wanted(self, config: Config) -> bool:
        """Whether the config's student learns from it."""

    @abstractmethod
    def cache_folder(self, config: Config) -> str | None:
        """The folder of its cache; None: the teacher works while training."""

    @abstractmethod
    def how_to_cache(self, config: Config) -> str:
        """How messages go on that ask for its teacher: ", or set ..." the cache, nothing where it cannot be cached."""

    @abstractmethod
    def title(self, config: Config) -> str:
        """What people call it."""

    @abstractmethod
    def load_teacher(self, config: Config, vocab_size: int, device: "torch.device", model=None) -> Teacher:
        """Load its teacher for tokens of `vocab_size` ids; its language model may be there already. Raises
        `CocomixError` where it cannot."""

    def make_teacher(self, config: Config, tokens: TokenFiles, device: "torch.device", model=None) -> Teacher:
        """As `load_teacher`; raises `CocomixError` where the teacher does not know the tokens."""
        from cocomix.teacher.language_model import require_vocabulary

        teacher = self.load_teacher(config, tokens.vocab_size, device, model)
        require_vocabulary(teacher.model, tokens)
        return teacher

    @abstractmethod
    def teacher_shape(self, config: Config, n_embd: int, n_layer: int, vocab_size: int) -> TeacherShape:
        """The shape of its teacher with a language model of that width, depth and vocabulary. Raises `CocomixError`
        where they do not fit the config."""

    @abstractmethod
    def random_teacher(self, config: Config, vocab_size: int, model: Any) -> Teacher:
        """Its teacher with `model` and, beside that, random weights: for profiles."""

    @abstractmethod
    def random_source(self, config: Config, vocab_size: int) -> Source:
        """What a full cache would hold, at random: for profiles. Raises `CocomixError` where none could."""

    @abstractmethod
    def require_fit(self, config: Config, teacher: Any) -> None:
        """Raise `CocomixError` where the config's student cannot learn from the teacher."""

    @abstractmethod
    def known_fingerprints(self, config: Config) -> dict[str, str]:
        """The part of a cache's fingerprints that the config tells without a teacher."""

    @abstractmethod
    def cache_values(self, teacher: Any, input_ids: "torch.Tensor") -> Any:
        """What the teacher says of windows [B, T], as the cache's `writer` takes it."""

    def as_source(self, config: Config, cache: Any) -> Source:
        """The cache as the config's student reads it."""
        return cache

    def open_cache(self, config: Config, tokens: TokenFiles) -> Source:
        """Open its cache for a training run. Raises `CocomixError` where that was made from something else or is not
        complete.

        The ranks share the looks at its shards, and the first one alone loads the teacher to compare its fingerprints:
        hundreds of copies of it would come from the same disk.
        """
        import torch

        from cocomix.distributed.ranks import rank_and_world

        rank, world = rank_and_world()
        cache = self.cache_class.open(self.cache_folder(config))
        expected = data_fingerprints(config, tokens) | self.known_fingerprints(config)
        if rank == 0 and all(getattr(config.teacher, key) for key in self.teacher_settings):
            teacher = self.make_teacher(config, tokens, torch.device("cpu"))
            self.require_fit(config, teacher)
            expected |= teacher.fingerprints()
        cache.require(expected)
        cache.require_complete(rank, world)
        return self.as_source(config, cache)

    def start_cache(self, config: Config, tokens: TokenFiles, teacher: Teacher) -> ShardCache:
        """Start its cache of the training tokens, or go on with the one that is there. Raises `CocomixError` where that
        was made from something else, and where the disk has no room."""
        return self.cache_class.start(
            self.cache_folder(config),
            n_windows=tokens.split("train").n_windows(config.data.seq_len),
            seq_len=config.data.seq_len,
            size=self.per_token(config),
            fingerprints=data_fingerprints(config, tokens) | teacher.fingerprints(),
            shard_windows=config.concept_labels.shard_windows,
            flops_per_token=teacher_flops(teacher.shape, config.data.seq_len),
            **self.cache_settings(tokens.vocab_size),
        )

    def cache_settings(self, vocab_size: int) -> dict[str, Any]:
        """What its cache has in meta.json beside what all have."""
        return {}

    @abstractmethod
    def per_token(self, config: Config) -> int:
        """How many numbers or pairs a token has: the `size` of the cache."""


def data_fingerprints(config: Config, tokens: TokenFiles) -> dict[str, str]:
    """The part of a cache's fingerprints that the token files and the window length decide."""
    return {"data": tokens.split("train").fingerprint, "seq_len": str(config.data.seq_len)}
