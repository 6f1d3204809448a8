"""Documents: none without text, and cut into pieces where no token changes."""

import pytest
from data_helpers import PROSE, documents_of, encode_whole, write_jsonl

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data import documents, tokenizing
from cocomix.data.documents import pieces, require_text
from cocomix.data.sources import open_sources
from cocomix.data.tokenizing import tokenize


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


def test_long_documents_are_cut_without_changing_a_token(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 1000)
    monkeypatch.setattr(documents, "_CUT_SEARCH_CHARS", 400)
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
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)
    (tmp_path / "a.txt").write_text("é" * 1234, encoding="utf-8")
    stream = list(pieces(open_sources(DataConfig(text=[str(tmp_path)]))))
    assert "".join(piece.text for piece in stream) == "é" * 1234
    assert max(len(piece.text) for piece in stream) <= 100


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n', encoding="utf-8")
    assert documents_of(tmp_path / "a.jsonl") == ["a\ufffdb 🙂"]
