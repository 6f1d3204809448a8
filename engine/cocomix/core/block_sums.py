"""Checksums of the blocks of a file that is read here and there: CRC-32, see `checksums`."""

import array
import zlib

import numpy as np

BLOCK_BYTES = 1 << 16
SUM_DTYPE = np.dtype("<u4")


def block_count(n_bytes: int) -> int:
    """Blocks of a file of `n_bytes` bytes; the last one may be shorter."""
    return -(-n_bytes // BLOCK_BYTES)


class BlockSums:
    """Checksums of the blocks of what is written bit by bit."""

    def __init__(self) -> None:
        self._whole = array.array("I")
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

    `content` is the memory-mapped file or the part of it that is covered, `sums` its checksums [n_blocks]. `sound`
    [n_blocks] bool says which blocks have been compared; it may be kept for when the file is mapped anew.
    """

    def __init__(self, content: memoryview, sums: np.ndarray, sound: np.ndarray | None = None):
        self._content, self._sums = content, sums
        self._sound = np.zeros(len(sums), dtype=bool) if sound is None else sound

    def is_done(self, first: int, last: int) -> bool:
        """Whether all blocks of bytes `first` to `last` (exclusive) have been compared."""
        return bool(self._sound[first // BLOCK_BYTES : block_count(last)].all())

    def damaged(self, first: int, last: int) -> int | None:
        """The first block among those of bytes `first` to `last` (exclusive) whose checksum does not hold."""
        for block in range(first // BLOCK_BYTES, block_count(last)):
            if not self._sound[block]:
                if zlib.crc32(self._content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) != self._sums[block]:
                    return block
                self._sound[block] = True
        return None
