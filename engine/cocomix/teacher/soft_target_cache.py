"""Soft targets kept on disk: the ids of a teacher's likeliest tokens and their log-probabilities, two bytes each."""

from dataclasses import dataclass

import numpy as np

from cocomix.core.records import Count
from cocomix.teacher.shard_cache import CacheMeta, ShardCache

_MAX_IDS = 65536


@dataclass(frozen=True, kw_only=True)
class _SoftTargetMeta(CacheMeta):
    top_k: Count


class SoftTargetCache(ShardCache):
    """The J likeliest next tokens of a teacher at each token of a token file, four bytes each: id and log-probability.

    Log-probabilities are those in the whole vocabulary, in float16.
    """

    what, setting, stem, size_key = "soft-target cache", "distillation.cache", "soft-targets", "top_k"
    meta_class = _SoftTargetMeta
    names = {"top_k": "another number of soft targets a token"}

    @classmethod
    def create(
        cls, folder, *, n_windows: int, seq_len: int, top_k: int, fingerprints: dict, shard_windows: int = 4096
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
        )

    def window(self, index: int) -> dict[str, np.ndarray]:
        """Soft targets of one window: `soft_target_ids` int64 [T, J], `soft_target_log_probs` float16 [T, J]."""
        ids, log_probs = np.split(self._numbers(index), 2, axis=1)
        return {"soft_target_ids": ids, "soft_target_log_probs": log_probs.astype(np.uint16).view(np.float16)}

    def _width(self):
        return 2 * self.size

    def _encoded(self, values):
        ids, log_probs = (values[name].cpu().numpy() for name in ("soft_target_ids", "soft_target_log_probs"))
        if ids.size and (ids.min() < 0 or ids.max() >= _MAX_IDS):
            raise ValueError(f"token ids range from {ids.min()} to {ids.max()}, expected 0 to {_MAX_IDS - 1}")
        return np.concatenate([ids, log_probs.astype(np.float16).view(np.uint16)], axis=-1)
