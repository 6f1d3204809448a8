"""Files of numbers that are far larger than memory, read a window at a time."""

import mmap
import os
from pathlib import Path

import numpy as np

from cocomix.core.block_sums import BLOCK_BYTES, BlockCheck
from cocomix.core.errors import CocomixError

_FAULT_AROUND_BYTES = 1 << 16  # Linux maps up to so much of what it has in its cache around a page that is read


class MappedFile:
    """A file of fixed-width numbers, memory-mapped for reading here and there.

    `array` is all of it, flat and read-only. `read` fetches the wanted part from disk in one request and nothing around
    it (the system, not told, fetches up to megabytes with each), and lets go of the pages afterwards, so the process's
    resident memory does not grow with what it has read; what the system keeps in its page cache stays there. Raises
    `CocomixError`, ending in `remedy`, unless the file is there with `n_bytes` bytes; `unit` says what the numbers are.

    After `check`, `read` compares each block that it comes to with its checksum, the first time.
    """

    def __init__(self, path: Path, dtype: np.dtype, n_bytes: int, *, unit: str, remedy: str):
        self._dtype = np.dtype(dtype)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != n_bytes or size == 0:
                    width = self._dtype.itemsize
                    odd = f", an odd number for {width}-byte {unit}" if size % width else ""
                    raise CocomixError(f"{path} has {size:,} bytes{odd}, expected {n_bytes:,}: {remedy}")
                self._map = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CocomixError(f"there is no {path}: {remedy}") from None
        self.array = np.frombuffer(self._map, self._dtype, n_bytes // self._dtype.itemsize)
        self._path, self._remedy = path, remedy
        self._check: BlockCheck | None = None

    def check(self, n_bytes: int, sums: np.ndarray, sound: np.ndarray | None = None) -> None:
        """From now on compare the blocks of the first `n_bytes` bytes with `sums` [n_blocks] as they are read, but for
        those that are `sound` [n_blocks] already, where more are marked."""
        self._check = BlockCheck(memoryview(self._map)[:n_bytes], sums, sound)

    def bytes_from(self, first: int) -> bytes:
        """The bytes from number `first` to the end, fetched as `read` does."""
        self._advise(mmap.MADV_WILLNEED, first, len(self._map), mmap.PAGESIZE)
        content = self._map[first:]
        self._advise(mmap.MADV_DONTNEED, first, len(self._map), _FAULT_AROUND_BYTES)
        return content

    def read(self, start: int, count: int) -> np.ndarray:
        """A copy of `count` numbers from number `start` on, int64. Raises `CocomixError` for a damaged block."""
        first, last = start * self._dtype.itemsize, (start + count) * self._dtype.itemsize
        is_checked = self._check is None or self._check.is_done(first, last)
        self._advise(mmap.MADV_WILLNEED, first, last, mmap.PAGESIZE if is_checked else BLOCK_BYTES)
        self._require_sound(first, last)
        numbers = self.array[start : start + count].astype(np.int64)
        self._advise(mmap.MADV_DONTNEED, first, last, _FAULT_AROUND_BYTES)
        return numbers

    def _require_sound(self, first: int, last: int) -> None:
        block = None if self._check is None else self._check.damaged(first, last)
        if block is not None:
            raise CocomixError(
                f"{self._path} is damaged: the checksum of bytes {block * BLOCK_BYTES:,} to "
                f"{(block + 1) * BLOCK_BYTES - 1:,} does not hold: {self._remedy}"
            )

    def _advise(self, advice: int, first: int, last: int, granularity: int) -> None:
        first = first // granularity * granularity
        self._map.madvise(advice, first, min(-(-last // granularity) * granularity, len(self._map)) - first)
