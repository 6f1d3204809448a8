"""What follows the numbers in a shard of a cache: checksums, and what the shard was made from."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cocomix.core.block_sums import SUM_DTYPE, BlockSums, block_count

_SHA256_BYTES = 32


def origin_of(description: Mapping[str, Any]) -> bytes:
    """What stands in each shard for the cache that it belongs to: SHA-256 of the cache's description, JSON values."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).digest()


class ShardLayout:
    """A shard of `data_bytes` bytes of numbers, after which come the checksums of their blocks, the `origin` and the
    SHA-256 of all before it. Shards of version 1 have no origin (None) and no checksums of blocks."""

    def __init__(self, data_bytes: int, origin: bytes | None):
        self.data_bytes, self.origin = data_bytes, origin
        self.n_sums = 0 if origin is None else block_count(data_bytes)
        self.hashed_bytes = data_bytes + self.n_sums * SUM_DTYPE.itemsize + len(origin or b"")
        self.n_bytes = self.hashed_bytes + _SHA256_BYTES

    def sums(self, trailer: bytes) -> np.ndarray:
        """The checksums of the blocks of the numbers, in what follows those."""
        return np.frombuffer(trailer, SUM_DTYPE, self.n_sums)

    def origin_in(self, trailer: bytes) -> bytes | None:
        """The origin that is named in what follows the numbers; None where none is."""
        return None if self.origin is None else trailer[-_SHA256_BYTES - len(self.origin) : -_SHA256_BYTES]


class ShardSums:
    """The checksums of a shard that is being written."""

    def __init__(self, layout: ShardLayout):
        self._layout, self._digest, self._sums = layout, hashlib.sha256(), BlockSums()

    def update(self, content: bytes) -> None:
        """Take the next of its numbers."""
        self._digest.update(content)
        self._sums.update(content)

    def trailer(self) -> bytes:
        """What follows the numbers."""
        origin = self._layout.origin
        checked = b"" if origin is None else self._sums.digest() + origin
        self._digest.update(checked)
        return checked + self._digest.digest()
