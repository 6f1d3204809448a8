import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cocomix.core import checksums


def test_a_file_has_the_checksum_of_its_bytes(tmp_path):
    content = np.random.default_rng(0).bytes((1 << 22) + 3)
    (tmp_path / "file").write_bytes(content)
    assert checksums.of_file(tmp_path / "file") == f"{zlib.crc32(content):08x}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), JSON, min_size=2), st.data())
def test_a_json_value_has_its_checksum_in_any_order_and_another_one_when_it_changes(value, data):
    backwards = dict(reversed(value.items()))
    assert checksums.of_value(value) == checksums.of_value(backwards)
    key = data.draw(st.sampled_from(sorted(value)))
    assert checksums.of_value({**value, key: [value[key]]}) != checksums.of_value(value)


def test_keys_and_tuples_count_as_json_has_them():
    assert checksums.of_value({1: (1, 2)}) == checksums.of_value({"1": [1, 2]})


def test_an_arrays_checksum_depends_on_its_label_too():
    array = memoryview(b"abcd")
    assert checksums.of_array("x int8 [4]", array) != checksums.of_array("x int32 [1]", array)
