import gzip
import json
import os

import numpy as np
import pyarrow
import pytest
import tiktoken
from pyarrow import parquet
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data import sources, tokenizing
from cocomix.data.documents import Piece, pieces, require_text
from cocomix.data.preparation import Splitter, prepare
from cocomix.data.sources import open_sources
from cocomix.data.tokenizer import END_OF_TEXT, train_tokenizer, vocab_size_of
from cocomix.data.tokenizing import tokenize

PROSE = "The café sells naïve crêpes.\n\n  Don't ask 12345 why; 日本語 🙂 works too.\n\ttabs\r\nand windows lines\n"


def documents(*names, **settings) -> list[str]:
    found = {}
    for piece in pieces(open_sources(DataConfig(text=[str(name) for name in names], **settings))):
        found[piece.document] = found.get(piece.document, "") + piece.text
    assert list(found) == list(range(len(found)))
    return list(found.values())


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


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
    assert documents(corpus) == [PROSE, "second", "third"]


def test_a_glob_gives_the_files_it_matches(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    assert documents("corpus/*.txt") == ["second"]
    assert documents(corpus / "**/*.??") == [PROSE, "third"]
    assert documents("corpus/s*") == ["third"]


def test_sources_follow_one_another_in_the_order_given(corpus):
    assert documents(corpus / "b.txt", corpus / "sub", corpus / "b.txt") == ["second", "third", "second"]


def test_the_folder_of_token_files_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.json").write_text("{}", encoding="utf-8")
    assert documents(tmp_path, folder=str(tmp_path / "data")) == ["text"]


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
    assert documents(path, text_key="body") == [PROSE, "x"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut', "not JSON"),
        ('{"body": "b"}', "its fields are body"),
        ('{"text": 3}', "no text in the field"),
        ("[1]", "it is no object"),
        ("\udcff", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, problem):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(CocomixError, match=rf"records\.jsonl, line 3.*{problem}"):
        documents(path)


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(CocomixError, match=r"records\.jsonl\.gz cannot be read"):
        documents(path)


@pytest.fixture
def local_dataset(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": PROSE, "n": 1}, {"text": "", "n": 2}, {"text": "two", "n": 3}])
    write_jsonl(folder / "test.jsonl", [{"text": "held out", "n": 1}])
    return folder


def test_a_local_hugging_face_dataset_streams_its_column(local_dataset):
    assert documents(f"hf:{local_dataset}") == [PROSE, "two"]
    assert documents(f"hf:{local_dataset}:test") == ["held out"]


def test_a_missing_column_a_column_of_numbers_and_a_missing_split_are_named(local_dataset):
    with pytest.raises(CocomixError, match="no column 'body'; its columns are text, n"):
        documents(f"hf:{local_dataset}", text_key="body")
    with pytest.raises(CocomixError, match="row 0: column 'n' holds int, not text"):
        documents(f"hf:{local_dataset}", text_key="n")
    with pytest.raises(CocomixError, match="hf:.*:nosplit cannot be loaded"):
        documents(f"hf:{local_dataset}:nosplit")


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
    assert documents(f"hf:{folder}:train:hard") == ["hard text"]
    with pytest.raises(CocomixError, match="hf:.*:train:none cannot be loaded"):
        documents(f"hf:{folder}:train:none")


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_every_row_of_a_parquet_file_is_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PARQUET_ROWS", 2)
    write_parquet(tmp_path / "rows.parquet", body=[PROSE, "", None, "x", "y"], id=list(range(5)))
    (tmp_path / "z.txt").write_text("plain", encoding="utf-8")
    assert documents(tmp_path / "rows.parquet", text_key="body") == [PROSE, "x", "y"]
    assert documents(tmp_path, text_key="body") == [PROSE, "x", "y", "plain"]


def test_a_parquet_file_without_the_column_or_with_numbers_or_damaged_is_named(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", body=["text"], id=[1])
    with pytest.raises(CocomixError, match=r"rows\.parquet: no column 'text'; its columns are body, id; set data.text"):
        documents(path)
    with pytest.raises(CocomixError, match=r"rows\.parquet: column 'id' holds int64, not text"):
        documents(path, text_key="id")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CocomixError, match=r"rows\.parquet cannot be read"):
        documents(path, text_key="body")


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
    own = {kind: documents(three_kinds[kind], text_key="body" if kind == "b" else "text") for kind in "abc"}
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


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no text in it"),
        (b" \n ", "no text in it"),
        (b"a\0b", "not UTF-8 text"),
        (b"caf\xe9", "not UTF-8 text"),
    ],
)
def test_a_named_file_without_text_is_refused(tmp_path, content, problem):
    (tmp_path / "file.txt").write_bytes(content)
    (source,) = open_sources(DataConfig(text=[str(tmp_path / "file.txt")]))
    with pytest.raises(CocomixError, match=problem):
        require_text(source)


def test_a_folder_of_nothing_but_binary_files_has_no_text(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\0" * 100)
    (source,) = open_sources(DataConfig(text=[str(tmp_path)]))
    with pytest.raises(CocomixError, match="no text in it"):
        require_text(source)


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


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([PROSE * 20, "word, word's  words " * 20], 400)


def encode_whole(tokenizer, string):
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def test_a_trained_tokenizer_is_lossless_and_starts_with_the_end_of_text_token(tokenizer):
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 0
    unseen = "Ünseen \x00 \u2028 русский\n"
    assert tokenizer.decode(encode_whole(tokenizer, unseen)) == unseen


def test_a_small_corpus_gives_a_smaller_vocabulary():
    assert 257 < vocab_size_of(train_tokenizer(["abab abab"], 4096)) < 270
    with pytest.raises(CocomixError, match="data.vocab_size is 256; .* at least 257"):
        train_tokenizer(["text"], 256)


def test_long_documents_are_cut_without_changing_a_token(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("cocomix.data.documents.PIECE_CHARS", 1000)
    monkeypatch.setattr("cocomix.data.documents._CUT_SEARCH_CHARS", 400)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARS", 2500)
    long = "".join(f"{number} {PROSE}" for number in range(300))
    one_line = "word, word's  words " * 1000
    (tmp_path / "a.txt").write_bytes(long.encode())
    write_jsonl(tmp_path / "b.jsonl", [{"text": one_line}])
    stream = list(pieces(open_sources(DataConfig(text=[str(tmp_path)]))))
    assert max(len(piece.text) for piece in stream) <= 1000
    assert sum(piece.last for piece in stream) == 2
    ids = [[], []]
    for piece, part in tokenize(stream, tokenizer):
        ids[piece.document] += part.tolist()
    assert ids[0] == [*encode_whole(tokenizer, long), 0]
    assert ids[1] == [*encode_whole(tokenizer, one_line), 0]


def test_text_without_any_place_to_cut_is_still_read_whole_and_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("cocomix.data.documents.PIECE_CHARS", 100)
    (tmp_path / "a.txt").write_text("é" * 1234, encoding="utf-8")
    stream = list(pieces(open_sources(DataConfig(text=[str(tmp_path)]))))
    assert "".join(piece.text for piece in stream) == "é" * 1234
    assert max(len(piece.text) for piece in stream) <= 100


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n', encoding="utf-8")
    assert documents(tmp_path / "a.jsonl") == ["a\ufffdb 🙂"]


def test_special_tokens_inside_a_text_are_text(tokenizer):
    ((_, ids),) = tokenize([Piece(0, "a<|endoftext|>b", last=True)], tokenizer)
    assert ids.tolist().count(0) == 1 and ids[-1] == 0
    assert tokenizer.decode(ids[:-1].tolist()) == "a<|endoftext|>b"
    assert 0 in encode_whole(tokenizer, "<|endoftext|>"), "the tokenizer itself must be left as it was"


def stream_of(strings):
    return [Piece(number, string, last=True) for number, string in enumerate(strings)]


@pytest.mark.slow
def test_several_processes_give_the_same_tokens_in_the_same_order(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizing, "_BATCH_CHARS", 500)
    stream = stream_of(f"{number} {PROSE}" * (1 + number % 5) for number in range(200))
    alone, shared = (
        [(piece, ids.tolist()) for piece, ids in tokenize(stream, tokenizer, processes)] for processes in (1, 3)
    )
    assert alone == shared and [piece for piece, _ in alone] == stream


@pytest.mark.slow
def test_a_tokenizing_process_that_dies_is_reported(tokenizer, monkeypatch):
    # os.abort takes no arguments, so the processes end as they start
    monkeypatch.setattr(tokenizing, "_start_process", os.abort)
    with pytest.raises(CocomixError, match="one of the 2 processes that tokenize has died.*lower data.processes"):
        list(tokenize(stream_of(["text"]), tokenizer, 2))


def test_text_is_read_no_further_than_a_few_batches_ahead(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizing, "_BATCH_CHARS", 100)
    read = []

    def stream():
        for piece in stream_of("word " * 25 for _ in range(50)):
            read.append(piece.document)
            yield piece

    for piece, _ in tokenize(stream(), tokenizer):
        assert len(read) - piece.document <= 5
    assert len(read) == 50


# --- tiktoken: the tokenizer of the public code's `prepare`, from the same merges


def tiktoken_of(tokenizer):
    """The same byte-level BPE for tiktoken: bytes of every token, in the order in which they were merged."""
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    ranks = {
        bytes(alphabet[character] for character in token): number
        for token, number in tokenizer.get_vocab().items()
        if token != END_OF_TEXT
    }
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # GPT-2's
    return tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 0})


@pytest.mark.parametrize("long", [False, True])
def test_token_files_are_those_that_tiktoken_makes(tmp_path, tokenizer, long, monkeypatch):
    if long:
        monkeypatch.setattr("cocomix.data.documents.PIECE_CHARS", 300)
        monkeypatch.setattr("cocomix.data.documents._CUT_SEARCH_CHARS", 150)
    stories = [f"{number}: {PROSE}" * (1 + number % 4) + "  \n\n" * (number % 2) for number in range(30)]
    write_jsonl(tmp_path / "stories.jsonl", [{"text": story} for story in stories])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoding = tiktoken_of(tokenizer)
    files = prepare(
        DataConfig(
            folder=str(tmp_path / "data"),
            text=[str(tmp_path / "stories.jsonl")],
            tokenizer=str(tmp_path / "tokenizer"),
            val_fraction=0.2,
        )
    )
    side, expected = Splitter(0.2), {"train": [], "val": []}
    for number, story in enumerate(stories):
        expected[side(Piece(number, story, True))] += [*encoding.encode_ordinary(story), encoding.eot_token]
    for name, ids in expected.items():
        assert (files.folder / f"{name}.bin").read_bytes() == np.array(ids, dtype=np.uint16).tobytes()
