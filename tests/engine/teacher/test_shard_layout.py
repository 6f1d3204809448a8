import hashlib

import numpy as np
import pytest

from cocomix.core.block_sums import BLOCK_BYTES, BlockCheck
from cocomix.teacher.shard_layout import ShardLayout, ShardSums, origin_of

ORIGIN = origin_of({"seq_len": 4, "fingerprints": {"data": "x"}})


def shard(data: bytes, layout: ShardLayout) -> bytes:
    sums = ShardSums(layout)
    sums.update(data[:1000])
    sums.update(data[1000:])
    return data + sums.trailer()


@pytest.mark.parametrize("size", [2, BLOCK_BYTES, 2 * BLOCK_BYTES + 6])
def test_after_the_numbers_come_block_sums_the_origin_and_a_hash_of_all(size):
    data, layout = np.random.default_rng(0).bytes(size), ShardLayout(size, ORIGIN)
    content = shard(data, layout)
    assert len(content) == layout.n_bytes
    assert layout.origin_in(content[size:]) == ORIGIN
    assert BlockCheck(memoryview(content)[:size], layout.sums(content[size:])).damaged(0, size) is None
    assert content[layout.hashed_bytes :] == hashlib.sha256(content[: layout.hashed_bytes]).digest()


def test_a_shard_of_version_1_has_a_hash_of_its_numbers_alone():
    data, layout = b"ab" * 5000, ShardLayout(10_000, None)
    content = shard(data, layout)
    assert content == data + hashlib.sha256(data).digest() and len(content) == layout.n_bytes
    assert layout.n_sums == 0 and layout.origin_in(content[10_000:]) is None


def test_an_origin_depends_on_what_it_is_of_and_not_on_the_order_of_keys():
    assert origin_of({"fingerprints": {"data": "x"}, "seq_len": 4}) == ORIGIN
    assert origin_of({"seq_len": 4, "fingerprints": {"data": "y"}}) != ORIGIN
