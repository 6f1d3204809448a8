"""Soft targets kept on disk: the ids of a teacher's likeliest tokens and their log-probabilities, two bytes each; ids
of vocabularies above 65,536 take four."""

from dataclasses import dataclass
from typing import cast

import numpy as np

from cocomix.core.records import Count
from cocomix.teacher.shard_cache import CacheMeta, ShardCache

_NARROW_IDS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class _SoftTargetMeta(CacheMeta):
    top_k: Count
    wide_ids: bool = False  # of four bytes


class SoftTargetCache(ShardCache):
    """The J likeliest next tokens of a teacher at each token of a token file, four or six bytes each: id and
    log-probability.

    Log-probabilities are those in the whole vocabulary, in float16.
    """

    what, setting, stem, size_key = "soft-target cache", "distillation.cache", "soft-targets", "top_k"
    meta_class = _SoftTargetMeta
    names = {"top_k": "another number of soft targets a token"}

    @classmethod
    def create(
        cls,
        folder,
        *,
        n_windows: int,
        seq_len: int,
        top_k: int,
        fingerprints: dict,
        shard_windows: int = 4096,
        vocab_size: int = _NARROW_IDS,
    ) -> "SoftTargetCache":
        """Start a cache, or go on with the one that is there. Raises `CocomixError` where that one was made from
        something else, and where the disk has no room for all soft targets."""
        return cls.start(
            folder,
            n_windows=n_windows,
            seq_len=seq_len,
            size=top_k,
            fingerprints=fingerprints,
            shard_windows=shard_windows,
            **cls.of_vocabulary(vocab_size),
        )

    @classmethod
    def of_vocabulary(cls, vocab_size: int) -> dict[str, bool]:
        """What meta.json says of a vocabulary, as `start` takes it."""
        return {"wide_ids": vocab_size > _NARROW_IDS}

    def window(self, index: int) -> dict[str, np.ndarray]:
        """Soft targets of one window: `soft_target_ids` int64 [T, J], `soft_target_log_probs` float16 [T, J]."""
        ids, *high, log_probs = np.split(self._numbers(index), self._parts, axis=1)
        if high:
            ids = ids + (high[0] << 16)
        return {"soft_target_ids": ids, "soft_target_log_probs": log_probs.astype(np.uint16).view(np.float16)}

    @property
    def _parts(self) -> int:
        """Numbers of two bytes of a soft target: of the id, the lowest first, and the log-probability."""
        return 3 if cast(_SoftTargetMeta, self._meta).wide_ids else 2

    def _width(self):
        return self._parts * self.size

    def _encoded(self, values):
        ids, log_probs = (values[name].cpu().numpy() for name in ("soft_target_ids", "soft_target_log_probs"))
        most = 1 << (16 * (self._parts - 1))
        if ids.size and (ids.min() < 0 or ids.max() >= most):
            raise ValueError(f"token ids range from {ids.min()} to {ids.max()}, expected 0 to {most - 1}")
        parts = [ids >> (16 * place) & 0xFFFF for place in range(self._parts - 1)]
        return np.concatenate([*parts, log_probs.astype(np.float16).view(np.uint16)], axis=-1)
