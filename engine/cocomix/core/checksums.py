"""Checksums of what lies on disk: CRC-32, which catches every run of up to 32 wrong bits, and one in four billion of
longer ones slips through. zlib has it for every processor, at 1 to 7 GB/s a core.

Files that are read here and there have one for each block of `BLOCK_BYTES`. Files that are read whole have one each, in
the manifest of their folder. JSON files and lines carry their own.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_BYTES = 1 << 16
SUM_DTYPE = np.dtype("<u4")
_READ_BYTES = 1 << 22  # a whole number of blocks


def block_count(n_bytes: int) -> int:
    """Blocks of a file of `n_bytes` bytes; the last one may be shorter."""
    return -(-n_bytes // BLOCK_BYTES)


class BlockSums:
    """Checksums of the blocks of what is written bit by bit."""

    def __init__(self) -> None:
        self._whole: list[int] = []
        self._sum = self._filled = 0  # of the block that is being filled

    def update(self, content: bytes | memoryview) -> None:
        """Take the next bytes."""
        rest = memoryview(content)
        while rest:
            part = rest[: BLOCK_BYTES - self._filled]
            self._sum, self._filled, rest = zlib.crc32(part, self._sum), self._filled + len(part), rest[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._whole.append(self._sum)
                self._sum = self._filled = 0

    def digest(self) -> bytes:
        """The checksums so far, four bytes a block."""
        return np.array([*self._whole, *([self._sum] if self._filled else [])], SUM_DTYPE).tobytes()


class BlockCheck:
    """Compares blocks of a file with their checksums, each once.

    `content` is the memory-mapped file or the part of it that is covered, `sums` its checksums [n_blocks]. A byte a
    block is kept in memory.
    """

    def __init__(self, content: memoryview, sums: np.ndarray):
        self._content, self._sums = content, sums
        self._sound = np.zeros(len(sums), dtype=bool)

    def damaged(self, first: int, last: int) -> int | None:
        """The first block among those of bytes `first` to `last` (exclusive) whose checksum does not hold."""
        blocks = range(first // BLOCK_BYTES, block_count(last))
        for block in blocks:
            if not self._sound[block]:
                if zlib.crc32(self._content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) != self._sums[block]:
                    return block
                self._sound[block] = True
        return None


def of_file(path: str | os.PathLike[str]) -> str:
    """The checksum of a file, eight hexadecimal digits."""
    value = 0
    with open(path, "rb") as file:
        while content := file.read(_READ_BYTES):
            value = zlib.crc32(content, value)
    return _in_hexadecimal(value)


def of_value(value: Any) -> str:
    """The checksum of a JSON value, whatever the order of its keys, eight hexadecimal digits."""
    plain = json.loads(json.dumps(value))  # in which keys are strings and tuples are lists
    return _in_hexadecimal(zlib.crc32(json.dumps(plain, sort_keys=True).encode()))


def of_array(label: str, array: memoryview) -> str:
    """The checksum of an array's bytes and of the label that says what they are, eight hexadecimal digits."""
    return _in_hexadecimal(zlib.crc32(array, zlib.crc32(label.encode())))


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those below it, sorted."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _in_hexadecimal(value: int) -> str:
    return f"{value:08x}"
