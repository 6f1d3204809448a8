"""Sources of every kind: what they read, in what order, what tells them from another, and what they refuse."""

import gzip
import json
import os
import tracemalloc

import pyarrow
import pytest
from data_helpers import PROSE, documents_of, write_jsonl
from pyarrow import parquet

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data import json_records, tables
from cocomix.data.documents import pieces, require_text
from cocomix.data.sources import left_out_of, open_sources


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_text("second", encoding="utf-8")
    (folder / "a.md").write_bytes(PROSE.encode())
    (folder / "sub" / "c.py").write_text("third", encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n\n", encoding="utf-8")
    (folder / ".hidden").write_text("hidden", encoding="utf-8")
    (folder / ".git" / "config").write_text("hidden", encoding="utf-8")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "cut.txt").write_bytes("é".encode()[:1])
    (folder / "nul.bin").write_bytes(b"abc\0def")
    return folder


def test_a_folder_gives_its_text_files_sorted_and_nothing_hidden_binary_or_blank(corpus):
    assert documents_of(corpus) == [PROSE, "second", "third"]


def test_a_glob_gives_the_files_it_matches(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    assert documents_of("corpus/*.txt") == ["second"]
    assert documents_of(corpus / "**/*.??") == [PROSE, "third"]
    assert documents_of("corpus/s*") == ["third"]


def test_sources_follow_one_another_in_the_order_given(corpus):
    assert documents_of(corpus / "b.txt", corpus / "sub", corpus / "b.txt") == ["second", "third", "second"]


def test_the_folder_of_token_files_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.json").write_text("{}", encoding="utf-8")
    assert documents_of(tmp_path, folder=str(tmp_path / "data")) == ["text"]


def test_the_standard_library_comes_without_packages_and_tests():
    (source,) = open_sources(DataConfig(text=["stdlib"]))
    names = {os.path.relpath(path, source.root) for path in source.files}
    assert {"json/decoder.py", "dataclasses.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if {"site-packages", "test", "tests", "idle_test"} & set(name.split("/"))]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz"])
def test_every_line_of_a_jsonl_file_is_a_document(tmp_path, suffix):
    lines = "\n".join([json.dumps({"body": PROSE, "id": 1}), "", json.dumps({"body": ""}), json.dumps({"body": "x"})])
    path = tmp_path / f"records{suffix}"
    path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith("gz") else lines.encode())
    assert documents_of(path, text_key="body") == [PROSE, "x"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut', "not JSON"),
        ('{"body": "b"}', "its fields are body"),
        ('{"text": 3}', "no text in the field"),
        ("[1]", "it is not an object"),
        ("\udcff", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, problem):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(CocomixError, match=rf"records\.jsonl, line 3.*{problem}"):
        documents_of(path)


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(CocomixError, match=r"records\.jsonl\.gz cannot be read"):
        documents_of(path)


@pytest.fixture
def local_dataset(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": PROSE, "n": 1}, {"text": "", "n": 2}, {"text": "two", "n": 3}])
    write_jsonl(folder / "test.jsonl", [{"text": "held out", "n": 1}])
    return folder


def test_a_local_hugging_face_dataset_streams_its_column(local_dataset):
    assert documents_of(f"hf:{local_dataset}") == [PROSE, "two"]
    assert documents_of(f"hf:{local_dataset}:test") == ["held out"]


def test_a_missing_column_a_column_of_numbers_and_a_missing_split_are_named(local_dataset):
    with pytest.raises(CocomixError, match="no column 'body'; its columns are text, n"):
        documents_of(f"hf:{local_dataset}", text_key="body")
    with pytest.raises(CocomixError, match="row 0: column 'n' holds int, not text"):
        documents_of(f"hf:{local_dataset}", text_key="n")
    with pytest.raises(CocomixError, match="hf:.*:nosplit cannot be loaded"):
        documents_of(f"hf:{local_dataset}:nosplit")


def test_a_hugging_face_dataset_may_have_subsets(tmp_path):
    folder = tmp_path / "dataset"
    for subset in ("easy", "hard"):
        (folder / subset).mkdir(parents=True)
        write_jsonl(folder / subset / "train.jsonl", [{"text": f"{subset} text"}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(f"- config_name: {subset}\n  data_files: {subset}/*.jsonl\n" for subset in ("easy", "hard"))
        + "---\n"
    )
    assert documents_of(f"hf:{folder}:train:hard") == ["hard text"]
    with pytest.raises(CocomixError, match="hf:.*:train:none cannot be loaded"):
        documents_of(f"hf:{folder}:train:none")


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_every_row_of_a_parquet_file_is_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_PARQUET_ROWS", 2)
    write_parquet(tmp_path / "rows.parquet", body=[PROSE, "", None, "x", "y"], id=list(range(5)))
    (tmp_path / "z.txt").write_text("plain", encoding="utf-8")
    assert documents_of(tmp_path / "rows.parquet", text_key="body") == [PROSE, "x", "y"]
    assert documents_of(tmp_path, text_key="body") == [PROSE, "x", "y", "plain"]


def test_a_parquet_file_without_the_column_or_with_numbers_or_damaged_is_named(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", body=["text"], id=[1])
    with pytest.raises(CocomixError, match=r"rows\.parquet: no column 'text'; its columns are body, id; set data.text"):
        documents_of(path)
    with pytest.raises(CocomixError, match=r"rows\.parquet: column 'id' holds int64, not text"):
        documents_of(path, text_key="id")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CocomixError, match=r"rows\.parquet cannot be read"):
        documents_of(path, text_key="body")


# --- mixtures


@pytest.fixture
def three_kinds(tmp_path):
    """60 short records, 40 long ones, 10 files: letters tell where a character comes from."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * (5 + i % 4)} for i in range(60)])
    write_parquet(tmp_path / "b.parquet", body=["b" * (40 + i % 7) for i in range(40)])
    (tmp_path / "c").mkdir()
    for number in range(10):
        (tmp_path / "c" / f"{number}.txt").write_text("c" * 300)
    return {kind: str(tmp_path / name) for kind, name in (("a", "a.jsonl"), ("b", "b.parquet"), ("c", "c"))}


def mixture(paths, weights):
    return [
        {"path": paths[kind], "weight": weight} | ({"text_key": "body"} if kind == "b" else {})
        for kind, weight in weights.items()
    ]


def test_a_mixture_keeps_the_shares_all_along_and_loses_and_repeats_nothing(three_kinds):
    weights = {"a": 0.1, "b": 0.7, "c": 0.2}
    (source,) = open_sources(DataConfig(text=mixture(three_kinds, weights)))
    texts = [piece.text for piece in pieces([source])]
    read, longest = dict.fromkeys("abc", 0), {"a": 8, "b": 46, "c": 300}
    for text_read in texts:
        read[text_read[0]] += len(text_read)
        total = sum(read.values())
        assert all(abs(read[kind] - weights[kind] * total) <= 2 * max(longest.values()) for kind in read)
    own = {kind: documents_of(three_kinds[kind], text_key="body" if kind == "b" else "text") for kind in "abc"}
    for kind in "abc":  # in their own order, from the first one on
        mixed = [text_read for text_read in texts if text_read[0] == kind]
        assert mixed == own[kind][: len(mixed)]
    assert source.ended_with == three_kinds["b"] and read["b"] == sum(map(len, own["b"]))
    assert [piece.text for piece in pieces([source])] == texts


def test_the_weights_need_not_sum_to_one(three_kinds):
    one, other = (
        open_sources(DataConfig(text=mixture(three_kinds, weights)))
        for weights in ({"a": 3, "b": 1}, {"a": 0.75, "b": 0.25})
    )
    assert list(pieces(one)) == list(pieces(other))


def test_entries_with_a_column_of_their_own_follow_one_another_where_there_are_no_weights(three_kinds):
    entries = [three_kinds["a"], {"path": three_kinds["b"], "text_key": "body"}]
    texts = [piece.text for piece in pieces(open_sources(DataConfig(text=entries)))]
    assert "".join(text_read[0] for text_read in texts) == "a" * 60 + "b" * 40


def test_the_fingerprint_of_a_mixture_follows_weights_and_parts(three_kinds):
    def fingerprint(**weights):
        return open_sources(DataConfig(text=mixture(three_kinds, weights)))[0].fingerprint()

    before = fingerprint(a=1, c=1)
    assert before == fingerprint(a=1, c=1) and json.dumps(before)
    assert before not in (fingerprint(a=1, c=2), fingerprint(a=1, b=1))
    os.utime(os.path.join(three_kinds["c"], "3.txt"), ns=(1, 1))
    assert fingerprint(a=1, c=1) != before


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"weight": 1}, "names no text"),
        (3, "3 names no text"),
        ({"path": "a.txt", "wieght": 1}, "unknown key wieght"),
        ({"path": "a.txt", "weight": 0}, "weight of a.txt is 0"),
        ({"path": "a.txt", "weight": "much"}, "is 'much'"),
        ({"path": "a.txt", "weight": float("nan")}, "is nan"),
        ({"path": "a.txt", "weight": True}, "is True"),
        ({"path": "b.txt"}, "b.txt has no weight but others have"),
        ("b.txt", "b.txt has no weight but others have"),
    ],
)
def test_entries_that_mean_nothing_are_refused(tmp_path, monkeypatch, entry, problem):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(CocomixError, match=problem):
        open_sources(DataConfig(text=[{"path": "c.txt", "weight": 1}, entry]))


def test_a_part_of_a_mixture_without_text_is_named(three_kinds, tmp_path):
    (tmp_path / "empty.txt").write_text(" ")
    entries = [*mixture(three_kinds, {"a": 1}), {"path": str(tmp_path / "empty.txt"), "weight": 1}]
    with pytest.raises(CocomixError, match=r"empty\.txt: there is no text in it"):
        require_text(open_sources(DataConfig(text=entries))[0])


def test_no_sources_missing_paths_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(CocomixError, match="data.text names no text"):
        open_sources(DataConfig())
    with pytest.raises(CocomixError, match="no file or folder nowhere"):
        open_sources(DataConfig(text=["nowhere"]))
    with pytest.raises(CocomixError, match="no text files in"):
        open_sources(DataConfig(text=[str(tmp_path)]))
    with pytest.raises(CocomixError, match="no text files in"):
        open_sources(DataConfig(text=[str(tmp_path / "*.txt")]))


def test_the_fingerprint_follows_content_names_and_times_but_not_the_working_folder(corpus, monkeypatch):
    def fingerprint(name):
        return open_sources(DataConfig(text=[name]))[0].fingerprint()

    for name in (str(corpus), str(corpus / "*.txt"), str(corpus / "b.txt")):
        before = fingerprint(name)
        monkeypatch.chdir(corpus)
        assert fingerprint(name) == before
        monkeypatch.chdir("/")
        assert fingerprint(name) == before
        os.utime(corpus / "b.txt", ns=(1, 1))
        changed = fingerprint(name)
        assert changed != before
        with open(corpus / "b.txt", "a", encoding="utf-8") as file:
            file.write("more")
        assert fingerprint(name)["bytes"] > changed["bytes"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_that_no_memory_holds_is_named_and_not_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_records, "_RECORD_BYTES", 1 << 20)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wb") as file:
        file.write(json.dumps({"text": "first"}).encode() + b"\n" + b"[" * (1 << 24))
    tracemalloc.start()
    try:
        with pytest.raises(CocomixError, match=f"{name}, line 2: longer than 1 MiB; a record is a line: split it"):
            documents_of(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_large_rows_of_a_parquet_file_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    rows = ["x" * (1 << 20) + str(number) for number in range(8)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", use_dictionary=False)
    monkeypatch.setattr(tables, "_PARQUET_BYTES", 3 << 20)
    metadata = parquet.ParquetFile(tmp_path / "a.parquet").metadata
    assert tables._rows_at_once(metadata) in (2, 3)
    assert documents_of(tmp_path / "a.parquet") == rows
    parquet.write_table(pyarrow.table({"text": ["small"] * 9}), tmp_path / "b.parquet")
    assert tables._rows_at_once(parquet.ParquetFile(tmp_path / "b.parquet").metadata) == tables._PARQUET_ROWS
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "c.parquet")
    assert documents_of(tmp_path / "c.parquet") == []


@pytest.mark.parametrize("max_epochs", [1, 2, 5])
def test_a_part_of_a_mixture_is_read_again_as_often_as_it_may(three_kinds, max_epochs):
    entries = [{**entry, "max_epochs": max_epochs} for entry in mixture(three_kinds, {"a": 1})]
    entries += mixture(three_kinds, {"b": 1})  # five times as long
    (source,) = open_sources(DataConfig(text=entries))
    texts = [piece.text for piece in pieces([source])]
    own, other = documents_of(three_kinds["a"]), documents_of(three_kinds["b"], text_key="body")
    mine, others = ([text for text in texts if text[0] == kind] for kind in "ab")
    assert mine == (own * max_epochs)[: len(mine)] and others == other[: len(others)]
    if max_epochs < 5:
        assert mine == own * max_epochs
        assert source.ended_with == (three_kinds["a"] if max_epochs == 1 else f"2 readings of {three_kinds['a']}")
    else:
        assert others == other and source.ended_with == three_kinds["b"]
    assert [piece.text for piece in pieces([source])] == texts


def test_what_a_part_leaves_out_is_counted_once_however_often_it_is_read(three_kinds, tmp_path):
    write_jsonl(tmp_path / "gaps.jsonl", [{"text": "a" * 9}, {"text": None}] * 5)
    entries = [{"path": str(tmp_path / "gaps.jsonl"), "weight": 1, "max_epochs": 3}, *mixture(three_kinds, {"b": 1})]
    (source,) = open_sources(DataConfig(text=entries))
    assert len([piece for piece in pieces([source]) if piece.text[0] == "a"]) == 15
    assert [(found.reason, found.count) for found in left_out_of([source])] == [("empty", 5)]


@pytest.mark.parametrize("max_epochs", [0, -1, 1.5, "2", True, None])
def test_impossible_epochs_are_refused(three_kinds, max_epochs):
    entries = [{**entry, "max_epochs": max_epochs} for entry in mixture(three_kinds, {"a": 1})]
    with pytest.raises(CocomixError, match=f"max_epochs of {three_kinds['a']} is .*: expected a whole number"):
        open_sources(DataConfig(text=entries))


def test_epochs_without_a_mixture_are_refused(three_kinds):
    with pytest.raises(CocomixError, match="has max_epochs but no weight"):
        open_sources(DataConfig(text=[{"path": three_kinds["a"], "max_epochs": 2}]))
