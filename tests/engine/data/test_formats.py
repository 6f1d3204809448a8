"""Every format that text is kept in: what comes out is what went in, whatever the file is called and packed with."""

import contextlib
import tempfile
from functools import partial
from pathlib import Path

import datasets
import pytest
from data_helpers import PROSE, documents_of, left_out
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from text_formats import COLUMNS, ENCODINGS, PACKINGS, TABLE_FILES, as_arrow, json_array, json_lines, json_objects

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data import formats, json_records, text_files
from cocomix.data.documents import require_text
from cocomix.data.sources import open_sources

TEXTS = [PROSE, "two", 'quotes " and \\ and {brackets] ,', "日本語 🙂 \x00 \u2028 end"]
JSON_FILES = {
    "a.jsonl": json_lines,
    "a.JSONL": json_lines,
    "a.ndjson": partial(json_lines, ascii_only=True),
    "a.json": json_lines,
    "part-00000": json_lines,
    "b.json": json_array,
    "c.Json": partial(json_array, indent=2),
    "d.json": json_objects,
    "e.jsonl": json_array,
    "part-00001": json_array,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_is_records_under_any_of_its_names(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(JSON_FILES[name](TEXTS).encode(encoding))
    assert documents_of(tmp_path / name) == documents_of(tmp_path) == TEXTS


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", {**JSON_FILES, **TABLE_FILES})
def test_packed_files_are_read_like_others(tmp_path, name, packing):
    content = {**JSON_FILES, **TABLE_FILES}[name](TEXTS)
    (tmp_path / f"{name}{packing}").write_bytes(
        PACKINGS[packing](content if isinstance(content, bytes) else content.encode())
    )
    assert documents_of(tmp_path) == TEXTS
    assert left_out(tmp_path) == {}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", TABLE_FILES)
def test_a_column_of_any_type_of_text_is_read(tmp_path, name, column):
    texts = [None, *TEXTS, "", "two"]
    (tmp_path / name).write_bytes(TABLE_FILES[name](texts, column))
    assert documents_of(tmp_path / name) == [*TEXTS, "two"]
    (reason,) = left_out(tmp_path).items()
    assert reason == ("empty", (2, [f"{name}, row 1", f"{name}, row 6"]))


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_that_datasets_saved_is_its_rows(tmp_path, splits):
    rows = datasets.Dataset.from_dict({"text": [*TEXTS, "last"], "n": list(range(5))})
    (datasets.DatasetDict({"train": rows}) if splits else rows).save_to_disk(tmp_path / "saved")
    assert documents_of(tmp_path / "saved") == [*TEXTS, "last"]
    assert all(reason.startswith("JSON") for reason in left_out(tmp_path / "saved"))
    (saved,) = [*(tmp_path / "saved").rglob("*.arrow")]
    assert documents_of(saved) == [*TEXTS, "last"]


def test_the_notes_of_a_saved_data_set_are_no_text_whatever_they_say(tmp_path):
    rows = datasets.Dataset.from_dict({"description": TEXTS})
    rows.info.description = "about"
    rows.save_to_disk(tmp_path)
    assert documents_of(tmp_path, text_key="description") == TEXTS


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=400)
BIG = st.integers(1, 2000).map(lambda n: '\\"é{[🙂 ' * n)


@settings(max_examples=60)
@given(
    st.lists(ANY_TEXT | BIG, max_size=8),
    st.sampled_from(sorted(JSON_FILES)),
    st.sampled_from(ENCODINGS),
    st.sampled_from(sorted(PACKINGS)),
    st.integers(1, 70),
)
@example(["a" * 100, "\\"], "b.json", "utf-16", ".zst", 1)
def test_what_json_says_is_what_comes_out(texts, name, encoding, packing, block_bytes):
    assume(texts or not name.startswith("part-"))  # an empty array under any name is text
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", block_bytes)
        path = Path(folder, f"{name}{packing}")
        path.write_bytes(PACKINGS[packing](JSON_FILES[name](texts).encode(encoding)))
        patch.setattr(formats, "_START_BYTES", max(200, block_bytes))
        assert documents_of(path) == [text for text in texts if text.strip()]


@settings(max_examples=40)
@given(
    st.lists(st.none() | ANY_TEXT, min_size=1, max_size=8),
    st.sampled_from(sorted(TABLE_FILES)),
    st.sampled_from(sorted(COLUMNS)),
    st.sampled_from(sorted(PACKINGS)),
)
def test_what_a_table_holds_is_what_comes_out(texts, name, column, packing):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}{packing}")
        path.write_bytes(PACKINGS[packing](TABLE_FILES[name](texts, column)))
        assert documents_of(path) == [text for text in texts if text and text.strip()]


@settings(max_examples=60)
@given(
    PLAIN_TEXT, st.sampled_from(ENCODINGS), st.sampled_from(sorted(PACKINGS)), st.sampled_from(["a.txt", "a.py", "a"])
)
def test_what_a_text_says_is_what_comes_out(text, encoding, packing, name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}{packing}")
        path.write_bytes(PACKINGS[packing](text.encode(encoding)))
        assert documents_of(path) == ([text] if text.strip() else [])


def test_a_folder_of_all_kinds_is_read_whole_and_the_rest_is_counted(tmp_path):
    long = PROSE * 600
    (tmp_path / "a.jsonl").write_text(json_lines(["lines"]))
    (tmp_path / "b.jsonl.zst").write_bytes(PACKINGS[".zst"](json_lines(["packed lines"]).encode()))
    (tmp_path / "c.txt.gz").write_bytes(PACKINGS[".gz"](b"packed text"))
    (tmp_path / "d.txt").write_bytes("wide".encode("utf-16"))
    (tmp_path / "e.txt").write_bytes(long.encode() + b"\xff" + long.encode())
    (tmp_path / "f.txt").write_bytes(b"x" * 200 + b"\0")
    (tmp_path / "g.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "h.zip").write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "i.bin").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "j.json").write_text('{"name": "settings"}')
    (tmp_path / "k.txt").write_text(" \n")
    (tmp_path / ".hidden").write_text("text")
    assert documents_of(tmp_path) == [
        "lines",
        "packed lines",
        "packed text",
        "wide",
        f"{long}\ufffd{long}",
        "x" * 200 + "\0",
    ]
    assert left_out(tmp_path) == {
        "hidden": (1, [".hidden"]),
        formats.UNDECODABLE: (1, ["e.txt: 1"]),
        formats.NULS: (1, ["f.txt: 1"]),
        "image": (1, ["g.png"]),
        "zip archive": (1, ["h.zip"]),
        formats.NOT_TEXT: (1, ["i.bin"]),
        "JSON without the field 'text'": (1, ["j.json"]),
        "empty": (1, ["k.txt"]),
    }


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b'{"body": "b"}', "a.json holds JSON without the field 'text'; set data.text_key"),
        ("a.json", b'[{"body": "b"}]', "a.json holds JSON without the field 'text'"),
        ("a.json", b'[{"text": "b"', "a.json, record 1: it has no end; the file is cut short"),
        ("a.json", b'[{"text": "b"}, {"text": "c', "a.json, record 2: it has no end"),
        ("a.zip", b"PK\x03\x04", r"a.zip: no kind of file that is read \(zip archive\): convert it"),
        ("a.txt", "café".encode("latin-1"), "a.txt is not UTF-8 text: convert it"),
        ("a.tar", b"a" * 257 + b"ustar", r"a.tar: .* \(tar archive\)"),
        ("a.warc.gz", PACKINGS[".gz"](b"WARC/1.0\r\n"), r"a.warc.gz: .* \(WARC archive\)"),
        ("a.parquet", b"no table", "a.parquet cannot be read"),
        ("a.arrow", b"no table", "a.arrow cannot be read"),
        ("a.arrow", as_arrow(["a", "b"])[:-150], "a.arrow cannot be read"),
    ],
)
def test_a_named_file_that_is_not_read_is_refused(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CocomixError, match=problem):
        documents_of(tmp_path / name)


@settings(max_examples=300)
@given(
    st.sampled_from(sorted({**JSON_FILES, **TABLE_FILES})),
    st.sampled_from(sorted(PACKINGS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["stop", "skip"]),
)
def test_a_damaged_file_is_read_or_refused(name, packing, changes, end, inside, on_bad_record):
    content = {**JSON_FILES, **TABLE_FILES}[name](TEXTS)
    content = content if isinstance(content, bytes) else content.encode()
    damaged = bytearray(content if inside else PACKINGS[packing](content))
    for where, byte in changes:
        damaged[int(where * len(damaged))] = byte
    damaged = bytes(damaged[: max(1, int(end * 2 * len(damaged)))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}{packing}")
        path.write_bytes(PACKINGS[packing](damaged) if inside else damaged)
        with contextlib.suppress(CocomixError):
            documents_of(path, on_bad_record=on_bad_record)


def test_a_folder_without_text_says_what_it_found(tmp_path):
    for name in ("a.zip", "b.zip", "c.zip", "d.zip"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    (tmp_path / "e.bin").write_bytes(b"\0" * 100)
    found = r"4 x zip archive \(.*a.zip, .*b.zip, .*c.zip, \.\.\.\); 1 x not UTF-8 text \(.*e.bin\)"
    with pytest.raises(CocomixError, match=f"there is no text in it, but {found}"):
        require_text(open_sources(DataConfig(text=[str(tmp_path)]))[0])
    only_hidden = tmp_path / "only_hidden"
    only_hidden.mkdir()
    (only_hidden / ".a").write_text("text")
    with pytest.raises(CocomixError, match=r"there are no text files in .*; it holds 1 x hidden"):
        open_sources(DataConfig(text=[str(only_hidden)]))


def test_text_that_looks_like_json_stays_text(tmp_path):
    texts = {"a.txt": '{"text": "a"}\n', "b.py": '[{"text": "b"}]', "c": "[Chapter 1]", "d": '{"body": "d"}', "e": "{"}
    texts |= {"f.txt": "PAR1 of 2", "g": "ARROW1", "h": "GIF8 bits", "i": "BZh9"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert documents_of(tmp_path) == list(texts.values())


def test_a_start_that_holds_no_whole_record_is_taken_for_records(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_START_BYTES", 100)
    long = ["x" * 1000, "y" * 1000]
    for name in ("a.json", "b.json", "c.json", "d.json"):
        (tmp_path / name).write_text(JSON_FILES[name](long) if name != "c.json" else json_array(long, indent=2))
    assert documents_of(tmp_path) == long * 4
    assert json_records.find_layout('{"a": 1, "te', False, "text") == ("JSON lines", None)


def test_names_say_what_can_be_known_without_opening():
    for name, plain, always in (
        ("a.txt", True, True),
        ("a.txt.gz", False, False),
        ("a.jsonl", False, True),
        ("a.JSONL", False, False),
        ("a.json", False, False),
        ("a.parquet", False, True),
        ("a.arrow", False, False),
    ):
        assert (formats.is_plainly_text(Path(name)), formats.was_always_read(Path(name))) == (plain, always), name
