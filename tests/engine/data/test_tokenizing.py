"""Tokenizing: the same tokens from any number of processes, a few batches ahead."""

import os
import subprocess
import sys
import time

import pytest
from data_helpers import PROSE, encode_whole

from cocomix.core.errors import CocomixError
from cocomix.data import tokenizing
from cocomix.data.documents import Piece
from cocomix.data.tokenizing import tokenize


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


@pytest.mark.slow
def test_the_processes_end_with_the_one_that_started_them(tokenizer, tmp_path):
    """Also where it is killed, and can end nobody."""
    tokenizer.save_pretrained(tmp_path)
    program = (
        "import itertools, multiprocessing, sys\n"
        "from cocomix.data.documents import Piece\nfrom cocomix.data.tokenizer import load_tokenizer\n"
        "from cocomix.data.tokenizing import tokenize\n"
        "stream = (Piece(number, 'a word ' * 500_000, last=True) for number in itertools.count())\n"
        "for _ in tokenize(stream, load_tokenizer(sys.argv[1]), 2):\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    workers = [int(pid) for pid in first.stdout.readline().split()]
    first.kill()
    first.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


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
