"""Tokenizers: trained on the text or loaded, and what token files ask of them."""

from collections.abc import Iterable

import numpy as np

from cocomix.core.errors import CocomixError
from cocomix.core.manifest import require_sound
from cocomix.core.model_names import OF_TOKENIZERS, as_transformers_names_it, first_line

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB = 1 << 31
_NARROW_VOCAB = 1 << 16
_MIN_BPE_VOCAB = 257  # 256 bytes and the end-of-text token


def token_dtype(vocab_size: int) -> np.dtype:
    """How token files hold ids: little-endian uint16 up to 65,536 of them, uint32 above."""
    return np.dtype("<u2") if vocab_size <= _NARROW_VOCAB else np.dtype("<u4")


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Train a byte-level BPE with `<|endoftext|>` as id 0; a transformers tokenizer.

    It has fewer than `vocab_size` ids when the text offers no more merges. Raises `CocomixError` for a `vocab_size`
    that does not hold every byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _MIN_BPE_VOCAB:
        raise CocomixError(f"data.vocab_size is {vocab_size}; a byte-level BPE has at least {_MIN_BPE_VOCAB} ids")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def load_tokenizer(name: str):
    """The transformers tokenizer of a folder, or of "hf:NAME" on the hub; no code that lies beside it is run. Raises
    `CocomixError` when there is none, or when it is damaged."""
    from transformers import AutoTokenizer

    try:
        place = as_transformers_names_it(name)
        require_sound(place, weights=False)
        return AutoTokenizer.from_pretrained(place, **OF_TOKENIZERS)
    except Exception as error:  # transformers, the hub client and tokenizers have no common base exception
        raise CocomixError(f"the tokenizer {name} cannot be loaded: {first_line(error)}") from error


def encode_document(tokenizer, text: str, **options):
    """What a transformers tokenizer makes of a document or of a piece of it, by the rule of `cocomix data`: what spells
    a special token in it, "<|endoftext|>" for example, is text like any other."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)


def vocab_size_of(tokenizer) -> int:
    """Highest id plus one. Raises `CocomixError` for a tokenizer that cannot make token files."""
    where = f"the tokenizer {tokenizer.name_or_path}"
    if not tokenizer.is_fast:
        raise CocomixError(f"{where} has no fast version (tokenizer.json): choose a tokenizer that has one")
    if tokenizer.eos_token_id is None:
        raise CocomixError(f"{where} has no end-of-text token: set its eos_token, or choose another tokenizer")
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    if vocab_size > MAX_VOCAB:
        raise CocomixError(f"{where} has an id of {vocab_size - 1}: at most {MAX_VOCAB - 1} can be kept")
    return vocab_size
