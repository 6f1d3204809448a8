"""A tokenizer, a corpus to prepare and a file of chosen tokens."""

import hashlib

import numpy as np
import pytest
from data_helpers import PROSE, story

from cocomix.core.config import DataConfig
from cocomix.data.token_files import TokenSplit
from cocomix.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([PROSE * 20, "word, word's  words " * 20], 400)


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number:02}.txt").write_text(story(number), encoding="utf-8")
    return DataConfig(folder=str(tmp_path / "data"), text=[str(corpus)], vocab_size=400, val_fraction=0.2)


@pytest.fixture
def make_split(tmp_path):
    def make(ids, vocab_size=50):
        content = np.asarray(ids, dtype="<u2").tobytes()
        (tmp_path / "train.bin").write_bytes(content)
        return TokenSplit(tmp_path / "train.bin", len(ids), vocab_size, hashlib.sha256(content).hexdigest())

    return make
