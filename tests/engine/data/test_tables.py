"""Parquet and Arrow: bad rows, columns that hold no text, and bounded memory whatever a row group unpacks to."""

import tempfile
import tracemalloc

import pyarrow
import pytest
from data_helpers import documents_of, left_out
from pyarrow import ipc, parquet
from text_formats import PACKINGS, TABLE_FILES, as_parquet

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data import tables
from cocomix.data.documents import pieces
from cocomix.data.left_out import Tally
from cocomix.data.sources import open_sources


def not_utf8(texts):
    raw = pyarrow.array([text.encode("latin-1") for text in texts], pyarrow.binary())
    return pyarrow.table({"text": raw.view(pyarrow.string())})


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_row_that_is_not_utf_8_stops_or_is_skipped_and_counted(tmp_path, name):
    rows = not_utf8(["one", "café", *["more"] * 30])
    if name == "a.parquet":
        parquet.write_table(rows, tmp_path / name)
    else:
        with ipc.new_stream(str(tmp_path / name), rows.schema) as writer:
            writer.write_table(rows)
    with pytest.raises(CocomixError, match=rf"{name}, row 2: not UTF-8"):
        documents_of(tmp_path / name)
    assert documents_of(tmp_path / name, on_bad_record="skip") == ["one", *["more"] * 30]
    assert left_out(tmp_path, on_bad_record="skip") == {"bad record": (1, [f"{name}, row 2"])}


@pytest.mark.parametrize("name", TABLE_FILES)
def test_a_column_that_is_missing_or_holds_no_text_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(TABLE_FILES[name](["a"]))
    with pytest.raises(CocomixError, match=r"no column 'body'; its columns are id, text; set data.text_key"):
        documents_of(tmp_path / name, text_key="body")
    with pytest.raises(CocomixError, match=r"column 'id' holds int64, not text; set data.text_key"):
        documents_of(tmp_path / name, text_key="id")


@pytest.mark.parametrize("kind", [pyarrow.list_(pyarrow.string()), pyarrow.dictionary(pyarrow.int8(), pyarrow.int64())])
def test_lists_and_dictionaries_of_others_are_no_text(tmp_path, kind):
    rows = pyarrow.table({"text": pyarrow.array([], kind)})
    with ipc.new_file(str(tmp_path / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    with pytest.raises(CocomixError, match="column 'text' holds .*, not text"):
        documents_of(tmp_path / "a.arrow")


def test_a_column_of_nothing_but_nulls_is_empty(tmp_path):
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), tmp_path / "a.parquet")
    assert documents_of(tmp_path / "a.parquet") == []
    assert left_out(tmp_path)["empty"][0] == 3


def test_a_row_group_that_repeats_a_large_text_is_read_in_little_memory(tmp_path):
    text = "x" * (1 << 22)
    indices = pyarrow.array([0] * 200, pyarrow.int32())
    rows = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(indices, [text])})
    for store_schema in (True, False):  # read as a dictionary, and as strings
        parquet.write_table(rows, tmp_path / "a.parquet", store_schema=store_schema)
        assert (tmp_path / "a.parquet").stat().st_size < 1 << 23
        before, peak, count = pyarrow.total_allocated_bytes(), 0, 0
        for (found,) in tables.read_parquet(tmp_path / "a.parquet", "text", Tally("a")):
            count += len(found) == len(text)
            peak = max(peak, pyarrow.total_allocated_bytes() - before)
        assert count == 200
        assert peak < 1 << 26


def test_offsets_that_lead_out_of_an_arrow_file_are_refused(tmp_path):
    texts = [f"number {number}" for number in range(50)]
    rows = pyarrow.table({"text": texts})
    with ipc.new_stream(str(tmp_path / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    content = (tmp_path / "a.arrow").read_bytes()
    third = b"".join(len("".join(texts[:n])).to_bytes(4, "little") for n in range(4, 8))
    assert content.count(third) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(third, b"\xff\xff\xff\x7f" * 4))
    with pytest.raises(CocomixError, match=r"a\.arrow cannot be read: .*offset"):
        documents_of(tmp_path / "a.arrow")


@pytest.mark.parametrize("name", TABLE_FILES)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_table_is_unpacked_on_disk_and_not_into_memory(tmp_path, monkeypatch, name, packing):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    texts = [str(number) + "x" * (1 << 20) for number in range(40)]
    (tmp_path / f"{name}{packing}").write_bytes(PACKINGS[packing](TABLE_FILES[name](texts)))
    before, peak, rows = pyarrow.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    try:
        for _ in pieces(open_sources(DataConfig(text=[str(tmp_path / f"{name}{packing}")]))):
            peak, rows = max(peak, pyarrow.total_allocated_bytes() - before), rows + 1
        # Arrow is mapped; of Parquet, a row group and what is read of it at a time are in memory
        assert rows >= 40 and peak < (1 << 28 if TABLE_FILES[name] is as_parquet else 1 << 23)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}{packing}"]


def test_a_large_row_group_is_read_without_a_dictionary_and_gives_the_same(tmp_path, monkeypatch):
    texts = ["one", "two", None, "one"] * 10
    (tmp_path / "a.parquet").write_bytes(as_parquet(texts))
    as_dictionary = documents_of(tmp_path)
    monkeypatch.setattr(tables, "_REPEATING_BYTES", 0)
    assert documents_of(tmp_path) == as_dictionary == ["one", "two", "one"] * 10
