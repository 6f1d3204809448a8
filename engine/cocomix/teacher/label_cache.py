"""Concept labels kept on disk: two bytes a label."""

from dataclasses import dataclass

import numpy as np

from cocomix.core.records import Count
from cocomix.teacher.shard_cache import CacheMeta, ShardCache

NONE = 65535  # how "no label" (-1) is stored


@dataclass(frozen=True, kw_only=True)
class _LabelMeta(CacheMeta):
    label_topk: Count


class LabelCache(ShardCache):
    """Concept labels of the windows of one token file: [n_windows, T, K] numbers of concepts below 65535, or -1."""

    what, setting, stem, size_key = "label cache", "concept_labels.cache", "labels", "label_topk"
    meta_class = _LabelMeta
    names = {
        "sae": "another SAE",
        "layer": "another block of the teacher",
        "label_topk": "another number of labels a token",
        "labels_by": "labels picked by another rule",
    }

    @classmethod
    def create(
        cls, folder, *, n_windows: int, seq_len: int, label_topk: int, fingerprints: dict, shard_windows: int = 4096
    ) -> "LabelCache":
        """Start a cache, or go on with the one that is there. Raises `CocomixError` where that one was made from
        something else, and where the disk has no room for all labels."""
        return cls.start(
            folder,
            n_windows=n_windows,
            seq_len=seq_len,
            size=label_topk,
            fingerprints=fingerprints,
            shard_windows=shard_windows,
        )

    def __init__(self, folder, meta: CacheMeta):
        super().__init__(folder, meta)
        self.fingerprints = {"labels_by": "attribution"} | self.fingerprints  # the only rule there once was

    @property
    def label_topk(self) -> int:
        """K: labels of a token."""
        return self.size

    def window(self, index: int) -> np.ndarray:
        """Labels of one window, int64 [T, K], -1 where there is none."""
        labels = self._numbers(index)
        labels[labels == NONE] = -1
        return labels

    def _width(self):
        return self.size

    def _encoded(self, values):
        labels = np.asarray(values)
        if labels.size and (labels.min() < -1 or labels.max() >= NONE):
            raise ValueError(f"labels range from {labels.min()} to {labels.max()}, expected -1 to {NONE - 1}")
        return np.where(labels < 0, NONE, labels)
