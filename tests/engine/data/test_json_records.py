"""JSON records: where each ends, however the text is cut; what a bad one leaves of the others; bounded memory."""

import json
import tracemalloc

import pytest
from data_helpers import documents_of, left_out, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from text_formats import PACKINGS, json_lines, records

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data import json_records
from cocomix.data.documents import pieces
from cocomix.data.json_records import LINES, VALUES, find_layout, split_values
from cocomix.data.sources import open_sources

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def cut(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


@given(st.lists(JSON, max_size=5), st.booleans(), st.sampled_from([None, 1]), st.integers(1, 40))
def test_an_array_is_cut_into_its_values(values, ascii_only, indent, size):
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    assert [json.loads(value) for value in split_values(cut(f"\n {text} \n", size), "a")] == values


@given(
    st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=5), st.sampled_from([None, 1]), st.integers(1, 9)
)
def test_objects_without_an_array_are_cut_where_they_end(values, indent, size):
    text = "\n".join(json.dumps(value, indent=indent) for value in values)
    assert [json.loads(value) for value in split_values(cut(text, size), "a")] == values


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1}', "a, record 1: it has no end"),
        ('[{"a": 1}, {"a": "cut', "a, record 2: it has no end"),
        ("[", "a, record 1: it has no end"),
        ('{"a": 1', "a, record 1: it has no end"),
        ("[1] x", "something behind the end of its array"),
        ("[1] []", "something behind the end of its array"),
    ],
)
def test_what_has_no_end_or_goes_on_is_refused(text, problem):
    for size in (1, 100):
        with pytest.raises(CocomixError, match=problem):
            list(split_values(cut(text, size), "a"))


@pytest.mark.parametrize(
    ("start", "is_whole", "layout"),
    [
        ("text", True, None),
        ("", True, None),
        ('{"text": "a"}\n', True, (LINES, True)),
        ('{"a": 1}\n{"text": "a"}', True, (LINES, True)),
        ('{"text": "cut\n{"text": "a"}', True, (LINES, True)),
        ('{"a": 1}', True, (LINES, False)),
        ('{"text": "a', False, (LINES, None)),
        ('{\n "text": "a"\n}', True, (VALUES, True)),
        ('{\n "a": {\n"text": 1}\n}', True, (VALUES, False)),
        ('[{"text": "a"}, {"te', False, (VALUES, True)),
        ('[{"te', False, (VALUES, None)),
        ("[1, 2]", True, (VALUES, False)),
        ("[]", True, (VALUES, None)),
    ],
)
def test_the_start_of_a_file_tells_how_its_records_lie(start, is_whole, layout):
    assert find_layout(start, is_whole, "text") == layout


GOOD = [f"text {number}" for number in range(80)]


def damaged(line: bytes) -> bytes:
    lines = json_lines(GOOD).encode().splitlines(keepends=True)
    return b"".join([*lines[:40], line + b"\n", *lines[40:]])


@pytest.mark.parametrize("line", [b'{"text": "cut', b'{"text": "\xff"}', b'{"body": 1}', b'{"text": 1}', b"[]"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson.gz"])
def test_a_bad_line_stops_or_is_skipped_and_counted(tmp_path, line, name):
    (tmp_path / name).write_bytes(PACKINGS[".gz" if name.endswith("gz") else ""](damaged(line)))
    with pytest.raises(CocomixError, match=rf"{name}, line 41: .*; data.on_bad_record=skip leaves such records out"):
        documents_of(tmp_path / name)
    assert documents_of(tmp_path / name, on_bad_record="skip") == GOOD
    assert left_out(tmp_path / name, on_bad_record="skip") == {"bad record": (1, [f"{name}, line 41"])}


@pytest.mark.parametrize("record", [b'{"text": "\xff"}', b'{"body": 1}', b'{"text": 1}', b"[]", b"{'a': 1}", b""])
def test_a_bad_record_of_an_array_stops_or_is_skipped_and_counted(tmp_path, record):
    good = [json.dumps(record).encode() for record in records(GOOD)]
    (tmp_path / "a.json").write_bytes(b"[" + b",".join([*good[:40], record, *good[40:]]) + b"]")
    with pytest.raises(CocomixError, match=r"a.json, record 41: .*; data.on_bad_record=skip"):
        documents_of(tmp_path / "a.json")
    assert documents_of(tmp_path / "a.json", on_bad_record="skip") == GOOD
    assert left_out(tmp_path / "a.json", on_bad_record="skip") == {"bad record": (1, ["a.json, record 41"])}


def test_null_is_an_empty_document(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}, {"text": " "}, {"text": "b"}])
    (tmp_path / "b.json").write_text('[{"text": null}, {"text": "c"}]')
    assert documents_of(tmp_path) == ["a", "b", "c"]
    assert left_out(tmp_path) == {"empty": (3, ["a.jsonl, line 2", "a.jsonl, line 3", "b.json, record 1"])}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_record_that_no_memory_holds_is_named_and_not_read(tmp_path, monkeypatch, name, packing):
    monkeypatch.setattr(json_records, "_RECORD_BYTES", 1 << 20)
    start = b'[{"text": "first"}, ' if name == "a.json" else b'{"text": "first"}\n'
    content = start + b'{"text": "' + b"x" * (1 << 24)
    (tmp_path / f"{name}{packing}").write_bytes(PACKINGS[packing](content))
    del content
    tracemalloc.start()
    try:
        with pytest.raises(CocomixError, match=r"a.json.*, (line|record) 2: longer than 1 MiB.*: split it"):
            documents_of(tmp_path / f"{name}{packing}")
        assert tracemalloc.get_traced_memory()[1] < 3 << 22
    finally:
        tracemalloc.stop()


def test_a_large_array_is_read_in_little_memory(tmp_path):
    with open(tmp_path / "a.json", "w") as file:
        file.write("[")
        for number in range(20000):
            file.write(("," if number else "") + json.dumps({"text": f"{number} " + "x\n" * 500}))
        file.write("]")
    tracemalloc.start()
    try:
        count = sum(1 for _ in pieces(open_sources(DataConfig(text=[str(tmp_path / "a.json")]))))
        assert count == 20000
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()
