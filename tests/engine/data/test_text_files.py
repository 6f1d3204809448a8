"""Plain text: what cannot be decoded is counted exactly, however the file is cut, and replaced."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocomix.core.errors import CocomixError
from cocomix.data import text_files
from cocomix.data.opening import explain_unreadable
from cocomix.data.text_files import Strange, as_utf8, blocks, encoding_of, look_through, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_names_the_encoding(encoding):
    assert encoding_of("text".encode(encoding)) == encoding
    assert encoding_of("\ufefftext".encode("utf-16-be")) == "utf-16"


@given(st.lists(st.sampled_from(["é", "a", "🙂", "\ufffd", "\0", b"\xff", b"\xc3("])), st.integers(1, 8))
def test_what_cannot_be_decoded_is_counted_and_replaced(tmp_path_factory, parts, block_bytes):
    path = tmp_path_factory.mktemp("strange") / "a.txt"
    content = b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    path.write_bytes(content)
    whole = content.decode(errors="replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", block_bytes)
        assert "".join(read_text(path, "utf-8")) == whole
        n_bad = sum(isinstance(part, bytes) for part in parts)
        assert look_through(path, "utf-8") == Strange(n_bad, parts.count("\0"), len(whole))


def test_a_text_has_few_strange_characters():
    assert Strange(0, 0, 0).is_text and Strange(1, 0, 100).is_text and Strange(0, 1, 100).is_text
    assert not Strange(1, 1, 100).is_text and not Strange(1, 0, 99).is_text


def test_the_end_of_a_cut_utf_16_file_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16") + b"x")
    assert look_through(tmp_path / "a.txt", "utf-16") == Strange(1, 0, 5)
    assert "".join(read_text(tmp_path / "a.txt", "utf-16")) == "text\ufffd"


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 9))
def test_lines_of_wide_text_are_those_of_the_same_text_in_utf_8(text, block_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", block_bytes)
        file = as_utf8(io.BytesIO(text.encode("utf-16")), "utf-16")
        assert file.readlines() == io.BytesIO(text.encode()).readlines()
    assert "".join(blocks(io.BytesIO(text.encode()), "utf-8", "strict")) == text


def test_wide_records_that_cannot_be_decoded_are_an_error_that_names_the_file(tmp_path):
    with pytest.raises(CocomixError, match="a.jsonl cannot be read: 'utf-16"), explain_unreadable(tmp_path / "a.jsonl"):
        as_utf8(io.BytesIO("a".encode("utf-16") + b"\x00\xd8a\0"), "utf-16").read()
