"""Files as they are opened: what packed them is told by how they begin, and reading them holds little in memory."""

import tracemalloc

import pyarrow
import pytest
from data_helpers import PROSE
from text_formats import PACKINGS

from cocomix.core.errors import CocomixError
from cocomix.data.opening import open_unpacked, packing_of, unpacked_on_disk

NAMES = dict(zip(PACKINGS, (None, "gzip", "bz2", "xz", "zstd"), strict=True))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("content", [b"", PROSE.encode() * 1000])
def test_a_packed_file_is_its_contents_under_any_name(tmp_path, packing, content):
    packed = PACKINGS[packing](content)
    assert packing_of(packed) == NAMES[packing]
    (tmp_path / "a.txt").write_bytes(packed)
    with open_unpacked(tmp_path / "a.txt") as file:
        assert file.read() == content
    with unpacked_on_disk(tmp_path / "a.txt") as place:
        assert place.read_bytes() == content
        assert (place == tmp_path / "a.txt") == (packing == "")
    assert place.exists() == (packing == "")


@pytest.mark.parametrize("packing", [name for name in PACKINGS if name])
def test_what_was_packed_in_parts_is_read_to_its_end(tmp_path, packing):
    (tmp_path / "a").write_bytes(PACKINGS[packing](b"one\n") + PACKINGS[packing](b"two\n"))
    with open_unpacked(tmp_path / "a") as file:
        assert file.readline(100) == b"one\n"
        assert file.readline(100) == b"two\n"


def test_zstandard_may_begin_with_a_frame_without_contents(tmp_path):
    frame = b"\x50\x2a\x4d\x18\x04\0\0\0meta"
    (tmp_path / "a").write_bytes(frame + pyarrow.compress(b"text", codec="zstd", asbytes=True))
    with open_unpacked(tmp_path / "a") as file:
        assert file.read() == b"text"


@pytest.mark.parametrize("packing", [name for name in PACKINGS if name])
def test_a_damaged_file_is_named(tmp_path, packing):
    packed = PACKINGS[packing](PROSE.encode() * 100)
    changed = [] if packing == ".zst" else [packed[:20] + b"\0\1\2\3" + packed[24:]]  # which has no checksum here
    for content in (packed[:-5], *changed):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(CocomixError, match=r"a\.txt cannot be read: ."), open_unpacked(tmp_path / "a.txt") as file:
            while file.read(100):
                pass


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_small_file_of_much_is_read_in_little_memory(tmp_path, packing):
    (tmp_path / "a").write_bytes(PACKINGS[packing](b"\0" * (1 << 26)))
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        with open_unpacked(tmp_path / "a") as file:
            total = 0
            while block := file.read(1 << 17):
                total += len(block)
        assert total == 1 << 26
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        assert pyarrow.total_allocated_bytes() - before < 1 << 23
    finally:
        tracemalloc.stop()
