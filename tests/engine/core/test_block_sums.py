import zlib

import numpy as np
import pytest

from cocomix.core.block_sums import BLOCK_BYTES, BlockCheck, BlockSums, block_count

SIZES = (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5)


def content_of(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("part", [1000, BLOCK_BYTES, 10**6])
def test_each_block_has_its_checksum_however_the_bytes_come(size, part):
    content, sums = content_of(size), BlockSums()
    for start in range(0, size, part):
        sums.update(content[start : start + part])
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, size, BLOCK_BYTES)]
    assert np.frombuffer(sums.digest(), "<u4").tolist() == [zlib.crc32(block) for block in blocks]
    assert len(blocks) == block_count(size)


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_wrong_bit_is_found_where_its_block_is_read_and_only_there(size):
    content = bytearray(content_of(size))
    sums = BlockSums()
    sums.update(bytes(content))
    stored = np.frombuffer(sums.digest(), "<u4")
    assert BlockCheck(memoryview(content), stored).damaged(0, size) is None
    for place in {0, size // 2, size - 1}:
        content[place] ^= 4
        check, block = BlockCheck(memoryview(content), stored), place // BLOCK_BYTES
        assert check.damaged(place, place + 1) == check.damaged(0, size) == block
        if block:
            assert check.damaged(0, block * BLOCK_BYTES) is None
        content[place] ^= 4


def test_a_block_is_compared_once():
    content, sums = bytearray(content_of(BLOCK_BYTES)), BlockSums()
    sums.update(bytes(content))
    check = BlockCheck(memoryview(content), np.frombuffer(sums.digest(), "<u4"))
    assert check.damaged(0, 10) is None
    content[5] ^= 1
    assert check.damaged(0, BLOCK_BYTES) is None
