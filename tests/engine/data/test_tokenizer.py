"""Tokenizers that are trained on the text."""

import pytest
from data_helpers import encode_whole

from cocomix.core.errors import CocomixError
from cocomix.data.documents import Piece
from cocomix.data.tokenizer import END_OF_TEXT, encode_document, token_dtype, train_tokenizer, vocab_size_of
from cocomix.data.tokenizing import tokenize


def test_a_trained_tokenizer_is_lossless_and_starts_with_the_end_of_text_token(tokenizer):
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 0
    unseen = "Ünseen \x00 \u2028 русский\n"
    assert tokenizer.decode(encode_whole(tokenizer, unseen)) == unseen


def test_a_small_corpus_gives_a_smaller_vocabulary():
    assert 257 < vocab_size_of(train_tokenizer(["abab abab"], 4096)) < 270
    with pytest.raises(CocomixError, match="data.vocab_size is 256; .* at least 257"):
        train_tokenizer(["text"], 256)


@pytest.mark.parametrize(
    "vocab_size, name", [(257, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (262_144, "uint32")]
)
def test_ids_take_two_bytes_as_long_as_they_fit(vocab_size, name):
    assert token_dtype(vocab_size).name == name
    assert token_dtype(vocab_size).newbyteorder("<") == token_dtype(vocab_size)


def test_a_special_tokens_spelling_in_a_document_is_text(tokenizer):
    text = f"one{END_OF_TEXT}two"
    ids = encode_document(tokenizer, text)["input_ids"]
    [(_, expected)] = tokenize(iter([Piece(0, text, False)]), tokenizer)
    assert ids == expected.tolist() and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"].count(tokenizer.eos_token_id) == 1  # as in a prompt, before and after
