"""`cocomix data`: what is in the token files, when they are made anew, and what a failure leaves behind."""

import builtins
import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from data_helpers import PROSE, story, write_jsonl
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data import documents
from cocomix.data.left_out import LeftOut
from cocomix.data.preparation import prepare
from cocomix.data.sources import open_sources
from cocomix.data.splitter import Splitter
from cocomix.data.token_files import TokenFiles
from cocomix.data.tokenizer import END_OF_TEXT, train_tokenizer

MADE = ["meta.json", "tokenizer", "train.bin", "train.sums", "val.bin", "val.sums"]


def split_tokens(files: TokenFiles, name: str) -> list[int]:
    return np.fromfile(files.folder / f"{name}.bin", dtype="<u2").tolist()


def test_token_files_are_the_documents_each_followed_by_end_of_text(config):
    files = prepare(config)
    tokenizer = files.tokenizer()
    expected, side = {"train": [], "val": []}, Splitter(0.2)
    for number in range(60):
        ids = tokenizer(story(number), add_special_tokens=False)["input_ids"]
        expected[side(number, len(story(number)))] += [*ids, files.eot_id]
    for name in ("train", "val"):
        assert split_tokens(files, name) == expected[name]
        entry = files.meta.splits[name]
        assert entry.tokens == len(expected[name]) == files.split(name).n_tokens
        assert entry.documents == expected[name].count(files.eot_id)
        assert entry.sha256 == hashlib.sha256((files.folder / f"{name}.bin").read_bytes()).hexdigest()
        files.split(name).verify()
    assert sum(files.meta.splits[name].text_bytes for name in expected) == sum(
        len(story(number).encode()) for number in range(60)
    )


def test_the_vocabulary_is_the_tokenizers_own(config):
    files = prepare(config)
    assert files.vocab_size == len(files.tokenizer()) <= 400
    assert files.eot_id == files.tokenizer().eos_token_id == 0


def test_the_same_text_gives_the_same_bytes(config, tmp_path):
    first = prepare(config)
    config.folder = str(tmp_path / "again")
    second = prepare(config)
    assert first.split("train").fingerprint == second.split("train").fingerprint
    assert first.split("val").fingerprint == second.split("val").fingerprint


def test_a_given_tokenizer_is_used_and_kept(config, tmp_path):
    train_tokenizer([story(1)], 300).save_pretrained(tmp_path / "given")
    config.tokenizer = str(tmp_path / "given")
    files = prepare(config)
    assert files.vocab_size <= 300
    assert files.tokenizer().get_vocab() == train_tokenizer([story(1)], 300).get_vocab()
    config.vocab_size = 999  # has no meaning for a tokenizer that is given
    prepare(config)


def test_a_tokenizer_without_end_of_text_and_a_broken_one_are_refused(config, tmp_path):
    config.tokenizer = str(tmp_path / "given")
    (tmp_path / "given").mkdir()
    with pytest.raises(CocomixError, match="given cannot be loaded"):
        prepare(config)
    tokenizer = train_tokenizer([story(1)], 300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(config.tokenizer)
    with pytest.raises(CocomixError, match="given has no end-of-text token"):
        prepare(config)
    assert not (tmp_path / "data" / "meta.json").exists()


def test_max_tokens_ends_with_the_document_that_reaches_it(config, tmp_path):
    whole = prepare(config)
    config.folder, config.max_tokens = str(tmp_path / "less"), 1000
    less = prepare(config)
    for name in ("train", "val"):
        tokens = split_tokens(less, name)
        assert tokens and tokens[-1] == less.eot_id
        assert tokens == split_tokens(whole, name)[: len(tokens)]
    total = sum(less.split(name).n_tokens for name in ("train", "val"))
    assert 1000 <= total < 1000 + len(less.tokenizer()(story(59))["input_ids"]) + 10


def test_the_unigram_perplexity_is_that_of_the_training_frequencies(config):
    files = prepare(config)
    train, val = (split_tokens(files, name) for name in ("train", "val"))
    nats = [-np.log((train.count(token) + 1) / (len(train) + files.vocab_size)) for token in val]
    assert files.meta.val_unigram_perplexity == pytest.approx(np.exp(np.mean(nats)))


def test_a_second_run_is_told_that_the_folder_is_up_to_date(config, capsys):
    files = prepare(config)
    stamp = (files.folder / "train.bin").stat().st_mtime_ns
    capsys.readouterr()
    assert prepare(config).meta == files.meta
    assert "up to date" in capsys.readouterr().out
    assert (files.folder / "train.bin").stat().st_mtime_ns == stamp


def test_a_folder_made_from_something_else_is_left_alone(config, tmp_path):
    files = prepare(config)
    before = files.split("train").fingerprint
    config.vocab_size = 500
    with pytest.raises(CocomixError, match="data.vocab_size was 400 and is 500.*Set data.folder .* or delete"):
        prepare(config)
    config.vocab_size = 400
    (tmp_path / "corpus" / "07.txt").write_text("changed", encoding="utf-8")
    with pytest.raises(CocomixError, match="the text changed: .*60 files of .* then"):
        prepare(config)
    config.text.append("stdlib")
    with pytest.raises(CocomixError, match="data.text was"):
        prepare(config)
    TokenFiles.open(config.folder).split("train").verify()
    assert files.split("train").fingerprint == before


def test_a_given_tokenizer_that_changed_counts_as_something_else(config, tmp_path):
    config.tokenizer = str(tmp_path / "given")
    train_tokenizer([story(1)], 300).save_pretrained(config.tokenizer)
    prepare(config)
    train_tokenizer([story(1)], 280).save_pretrained(config.tokenizer)
    with pytest.raises(CocomixError, match="data.tokenizer_sha256 was"):
        prepare(config)


def test_a_full_disk_leaves_nothing_behind(config, monkeypatch):
    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, data):
            self.file.write(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_open(path, mode="r", **options):
        file = builtins.open(path, mode, **options)
        return FullDisk(file) if "w" in mode else file

    with monkeypatch.context() as patch:
        patch.setattr("cocomix.core.files.open", full_open, raising=False)
        with pytest.raises(CocomixError, match="no room on disk while writing"):
            prepare(config)
    assert os.listdir(config.folder) == []
    prepare(config).split("train").verify()


def test_an_interrupted_run_starts_again_and_sweeps_up(config, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cocomix.data.preparation._save_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    ended, running = (subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2))
    ended.communicate(b"\n")
    half = {process: Path(config.folder, f".train.bin.{process.pid}.part") for process in (ended, running)}
    for path in half.values():
        path.write_bytes(b"half")
    with pytest.raises(CocomixError, match="description of the token files .* is missing"):
        TokenFiles.open(config.folder)
    prepare(config).split("train").verify()
    running.communicate(b"\n")
    assert sorted(os.listdir(config.folder)) == [half[running].name, *MADE]


def test_a_bad_record_in_the_middle_leaves_nothing_behind(config, tmp_path):
    (tmp_path / "corpus" / "30.jsonl").write_text('{"text": "good"}\n{"text": "cut\n', encoding="utf-8")
    with pytest.raises(CocomixError, match=r"30\.jsonl, line 2"):
        prepare(config)
    assert os.listdir(config.folder) == []


# --- what is left out


@pytest.fixture
def one_bad(config, tmp_path):
    """79 good records and a damaged one, beside an image; and settings that skip."""
    lines = [json.dumps({"text": story(number)}) for number in range(79)]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join([*lines[:7], '{"text": "cut', *lines[7:]]), encoding="utf-8")
    (tmp_path / "corpus" / "b.png").write_bytes(b"\x89PNG")
    return dataclasses.replace(config, on_bad_record="skip")


def test_what_is_left_out_is_printed_and_kept(one_bad, capsys):
    files = prepare(one_bad)
    corpus = one_bad.text[0]
    expected = [
        LeftOut(corpus, "bad record", 1, [f"{corpus}/a.jsonl, line 8"]),
        LeftOut(corpus, "image", 1, [f"{corpus}/b.png"]),
    ]
    assert files.meta.left_out == expected == TokenFiles.open(files.folder).meta.left_out
    said = "".join(f"left out of {corpus}: {found}\n" for found in expected)
    assert capsys.readouterr().out == said
    assert sum(split.documents for split in files.meta.splits.values()) == 60 + 79
    prepare(one_bad)
    assert capsys.readouterr().out.startswith(f"{said}{files.folder} is up to date")


def test_bad_records_stop_by_default_and_where_there_are_too_many(one_bad, tmp_path):
    with pytest.raises(CocomixError, match=r"a.jsonl, line 8: not JSON: .*; data.on_bad_record=skip leaves"):
        prepare(dataclasses.replace(one_bad, on_bad_record="stop"))
    with pytest.raises(CocomixError, match=r"1 of 80 records are bad.* raise data.max_bad_share, which is 0.01"):
        prepare(dataclasses.replace(one_bad, max_bad_share=0.01))
    given = tmp_path / "given"
    train_tokenizer([story(1)], 300).save_pretrained(given)
    with pytest.raises(CocomixError, match="1 of 80 records are bad"):
        prepare(dataclasses.replace(one_bad, max_bad_share=0.01, tokenizer=str(given)))
    assert os.listdir(one_bad.folder) == []


def test_a_folder_made_without_bad_records_is_not_what_stopping_would_have_made(one_bad):
    prepare(one_bad)
    with pytest.raises(CocomixError, match=r"was made without 1 x bad record .* set data.on_bad_record=skip"):
        prepare(dataclasses.replace(one_bad, on_bad_record="stop"))


def test_a_folder_made_of_good_records_is_up_to_date_whatever_becomes_of_bad_ones(config, capsys):
    prepare(config)
    prepare(dataclasses.replace(config, on_bad_record="skip", max_bad_share=0.5))
    assert "up to date" in capsys.readouterr().out


def test_a_folder_of_an_earlier_version_is_up_to_date_unless_more_is_read_now(config, tmp_path, capsys):
    folder = prepare(config).folder
    meta = json.loads((folder / "meta.json").read_text())
    assert meta.pop("left_out") == [] and meta.pop("cocomix_checksum")
    (folder / "meta.json").write_text(json.dumps(meta))
    assert prepare(config).meta.left_out is None
    said = capsys.readouterr()
    assert "up to date" in said.out and "earlier version, which did not say what it left out" in said.err
    (tmp_path / "corpus" / "more.jsonl.zst").write_bytes(b"")
    source = open_sources(config)[0].fingerprint()
    meta["sources"] = [{name: source[name] for name in source if name != "formats"}]  # as that version saw it
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CocomixError, match="more kinds of files are read now"):
        prepare(config)


def test_a_mixture_counts_what_its_parts_leave_out(config, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(story(1), encoding="utf-8")
        (tmp_path / name / "b.pdf").write_bytes(b"%PDF-1.7")
    config.text = [{"path": str(tmp_path / name), "weight": 1} for name in ("one", "two")]
    found = prepare(config).meta.left_out or []
    assert [(part.source, part.reason, part.count) for part in found][:1] == [(str(tmp_path / "one"), "PDF", 1)]
    assert f"left out of {tmp_path / 'one'}: 1 x PDF" in capsys.readouterr().out


def test_a_file_in_the_place_of_the_folder_is_named(config, tmp_path):
    (tmp_path / "data").write_text("in the way", encoding="utf-8")
    with pytest.raises(CocomixError, match="data.folder: .*data cannot be made"):
        prepare(config)


def test_one_document_is_split_by_tokens(config, tmp_path):
    (tmp_path / "one.txt").write_text(story(3) * 20, encoding="utf-8")
    config.text = [str(tmp_path / "one.txt")]
    files = prepare(config)
    train, val = split_tokens(files, "train"), split_tokens(files, "val")
    whole = [*files.tokenizer()(story(3) * 20, add_special_tokens=False)["input_ids"], files.eot_id]
    assert train + val == whole
    assert len(val) == pytest.approx(0.2 * len(whole), abs=1)
    for name in ("train", "val"):
        files.split(name).verify()
    assert sum(entry.text_bytes for entry in files.meta.splits.values()) == len(story(3).encode()) * 20


def test_one_character_still_makes_two_files(config, tmp_path):
    (tmp_path / "one.txt").write_text("x", encoding="utf-8")
    config.text = [str(tmp_path / "one.txt")]
    files = prepare(config)
    assert files.split("train").n_tokens == files.split("val").n_tokens == 1
    assert files.vocab_size == 257


def test_a_local_hugging_face_dataset_becomes_token_files(config, tmp_path):
    (tmp_path / "rows").mkdir()
    rows = "".join(json.dumps({"text": story(number)}) + "\n" for number in range(20))
    (tmp_path / "rows" / "train.jsonl").write_text(rows, encoding="utf-8")
    config.text = [f"hf:{tmp_path / 'rows'}"]
    files = prepare(config)
    decoded = files.tokenizer().decode(split_tokens(files, "train") + split_tokens(files, "val"))
    assert sorted(decoded.split("<|endoftext|>")) == sorted(["", *(story(number) for number in range(20))])
    prepare(config)
    (tmp_path / "rows" / "train.jsonl").write_text(rows * 2, encoding="utf-8")
    with pytest.raises(CocomixError, match="the text changed"):
        prepare(config)


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
        monkeypatch.setattr(documents, "PIECE_CHARS", 300)
        monkeypatch.setattr(documents, "_CUT_SEARCH_CHARS", 150)
    stories = [f"{number}: {PROSE}" * (1 + number % 4) + "  \n\n" * (number % 2) for number in range(30)]
    write_jsonl(tmp_path / "stories.jsonl", [{"text": text} for text in stories])
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
    for number, text in enumerate(stories):
        expected[side(number, len(text))] += [*encoding.encode_ordinary(text), encoding.eot_token]
    for name, ids in expected.items():
        assert (files.folder / f"{name}.bin").read_bytes() == np.array(ids, dtype=np.uint16).tobytes()


@pytest.mark.parametrize(
    "name", [*MADE[2:], "meta.json", "tokenizer/tokenizer.json", "tokenizer/cocomix_checksums.json"]
)
def test_no_damaged_file_is_called_up_to_date(config, name, capsys):
    folder = prepare(config).folder
    capsys.readouterr()
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CocomixError, match=str(folder)):
        prepare(config)
    assert "up to date" not in capsys.readouterr().out


def test_a_separator_splits_files_of_text_and_nothing_else(config, tmp_path, capsys):
    corpus = tmp_path / "collection"
    corpus.mkdir()
    stories = [story(number) for number in range(12)]
    (corpus / "a.txt").write_text("\n<|endoftext|>\n".join([*stories[:10], "", stories[10]]) + "\n<|endoftext|>\n")
    write_jsonl(corpus / "b.jsonl", [{"text": f"{stories[11]}<|endoftext|>{PROSE}"}])
    config.text, config.document_separator = [str(corpus)], "<|endoftext|>"
    files = prepare(config)
    tokenizer = files.tokenizer()
    found = []
    for name in ("train", "val"):
        for token in split_tokens(files, name):
            found = [*found, []] if not found or found[-1][-1:] == [files.eot_id] else found
            found[-1].append(token)
    texts = [tokenizer.decode(ids[:-1]) for ids in found]
    assert sorted(texts) == sorted([*stories[:11], f"{stories[11]}<|endoftext|>{PROSE}"])
    assert "1 x empty" in capsys.readouterr().out
    config.document_separator = None
    with pytest.raises(CocomixError, match="data.document_separator was '<|endoftext|>' and is None"):
        prepare(config)
