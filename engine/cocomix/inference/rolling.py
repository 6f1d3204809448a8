"""Rolling perplexity of texts: `cocomix eval CHECKPOINT... --text FILE`.

What lm-evaluation-harness computes for its `loglikelihood_rolling` tasks, such as WikiText
(github.com/EleutherAI/lm-evaluation-harness), without the harness and for any text: every token of a document is
predicted once. Documents stream, so that memory does not depend on the size of the text.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data.documents import Piece, pieces, require_text
from cocomix.data.left_out import HOW_TO_SKIP, say
from cocomix.data.sources import Source, left_out_of, open_sources
from cocomix.data.tokenizer import encode_document
from cocomix.distributed.export import description_folder, find_model, read_model
from cocomix.distributed.ranks import own_device
from cocomix.inference.loading import UsableModel, load_usable
from cocomix.training.validation import perplexity

_BLANKS = re.compile(r"\s+")
_TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
_BATCHES_SORTED = 16  # windows of so many batches are sorted by length, so that few short ones are padded to long ones


@dataclass(frozen=True)
class RollingOptions:
    """Texts (files, folders or whatever `data.text` takes), the field or column of records and tables that holds
    the text, tokens that the model reads at a time (None: all its context), predictions that count in each window
    after a document's first (None: all of them), and windows in a forward pass."""

    texts: tuple[str, ...]
    text_key: str = "text"
    seq_len: int | None = None
    stride: int | None = None
    batch: int = 8


@dataclass
class RollingScore:
    """What a model makes of texts: the sum of the log-likelihoods (nats) of all their tokens, and their sizes."""

    log_likelihood: float = 0.0
    tokens: int = 0
    words: int = 0
    bytes: int = 0
    documents: int = 0

    @property
    def token_perplexity(self) -> float:
        """exp(-log-likelihood / tokens)."""
        return perplexity(-self.log_likelihood / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp(-log-likelihood / words), with as many words in a document as `re.split(r"\\s+", text)` has parts."""
        return perplexity(-self.log_likelihood / self.words)

    @property
    def byte_perplexity(self) -> float:
        """exp(-log-likelihood / bytes of the text in UTF-8)."""
        return perplexity(-self.log_likelihood / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """-log-likelihood / bytes, in bits."""
        return -self.log_likelihood / self.bytes / math.log(2)


class Window(NamedTuple):
    """A stretch of tokens, int64 [n + 1]: the model reads the first n, and its last `n_scored` predictions count."""

    ids: np.ndarray
    n_scored: int


def evaluate_texts(checkpoints: list[str], options: RollingOptions) -> list[RollingScore]:
    """Print and return the rolling perplexity of each checkpoint (a transformers folder, a checkpoint or a run) over
    all texts together.

    Raises `CocomixError` for texts that are not there or empty, what is no model or has no tokenizer, and windows that
    the model cannot read.
    """
    if options.batch < 1:
        raise CocomixError(f"--batch is {options.batch}: expected at least 1")
    sources = _open_texts(options)
    for checkpoint in checkpoints:
        find_model(checkpoint)  # raises where there is none, before the work begins
    scores = []
    for checkpoint in checkpoints:
        usable = read_model(checkpoint, _load)
        seq_len, stride = _window_sizes(usable.context, options)
        with _named_as_options():
            score = rolling_score(usable, sources, seq_len, stride, options.batch)
        if not scores:
            say(left_out_of(sources))
        print(_line(checkpoint, score, seq_len, stride), flush=True)
        scores.append(score)
    return scores


def _load(folder: Path) -> UsableModel:
    _require_tokenizer(description_folder(folder))
    return load_usable(folder, own_device())


def rolling_score(usable: UsableModel, sources: list[Source], seq_len: int, stride: int, batch: int) -> RollingScore:
    """The score of a model on all documents of `sources`, in windows of at most `seq_len` tokens of which, but for a
    document's first, the last `stride` predictions count; `batch` windows go through the model at a time.

    Raises `CocomixError` where there is nothing to predict, and for a tokenizer without a token to begin with.
    """
    score = RollingScore()
    total = torch.zeros((), dtype=torch.float64, device=usable.model.device)
    for windows in _batches(_windows(usable.tokenizer, sources, seq_len, stride, score), batch):
        total += _log_likelihood(usable.model, windows)
    if not score.tokens:
        raise CocomixError(
            f"the tokenizer {usable.tokenizer.name_or_path} makes no tokens of these texts: it does not "
            "know their characters"
        )
    score.log_likelihood = float(total)
    return score


def rolling_windows(parts: Iterable[np.ndarray], prefix: int, seq_len: int, stride: int) -> Iterator[Window]:
    """The windows of one document, whose ids come in consecutive `parts` [n].

    Every id is scored once. The first window reads `prefix` and then ids, at most `seq_len` together. Each later one
    reads the `seq_len` ids before the last one that it scores, and scores `stride` ids, the last window what is left.
    With stride = seq_len these are lm-evaluation-harness's windows of context length 1.
    """
    held, unscored, n_scored = np.array([prefix], dtype=np.int64), 0, seq_len
    for ids in parts:
        held = np.concatenate([held, ids])
        unscored += len(ids)
        while unscored >= n_scored:
            end = len(held) - unscored + n_scored
            yield Window(held[max(0, end - seq_len - 1) : end], n_scored)
            unscored, n_scored = unscored - n_scored, stride
        held = held[-(unscored + seq_len) :]
    if unscored:
        yield Window(held[-(seq_len + 1) :], unscored)


def _windows(tokenizer, sources, seq_len, stride, score) -> Iterator[Window]:
    """Windows of all documents, whose sizes are added to `score` as they are read. The first token is predicted from
    the one that the harness puts there: what texts begin with, or else the end-of-text token."""
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise CocomixError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-text token, which a text's first "
            "token is predicted from: set its eos_token"
        )
    for _, document in groupby(pieces(sources), key=attrgetter("document")):
        yield from rolling_windows(_encoded(document, tokenizer, score), prefix, seq_len, stride)


def _encoded(document: Iterable[Piece], tokenizer, score: RollingScore) -> Iterator[np.ndarray]:
    """Ids of each piece; adds the document's sizes to `score`."""
    score.documents += 1
    score.words += 1
    ended_blank = False
    for piece in document:
        text = piece.text
        score.words += len(_BLANKS.findall(text)) - (ended_blank and text[0].isspace())  # a stretch of blanks, cut
        ended_blank = text[-1].isspace()
        score.bytes += len(text.encode())
        ids = np.array(encode_document(tokenizer, text)["input_ids"], dtype=np.int64)
        score.tokens += len(ids)
        yield ids


def _batches(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    while held := sorted(islice(windows, size * _BATCHES_SORTED), key=lambda window: len(window.ids)):
        for start in range(0, len(held), size):
            yield held[start : start + size]


@torch.no_grad()
def _log_likelihood(model, windows: list[Window]) -> torch.Tensor:
    """Sum of the log-likelihoods of what the windows score, float64 scalar."""
    longest = max(len(window.ids) for window in windows)
    rows = np.zeros((len(windows), longest), dtype=np.int64)
    counts = np.zeros(rows.shape, dtype=bool)
    for row, count, (ids, n_scored) in zip(rows, counts, windows, strict=True):
        row[: len(ids)] = ids  # what fills a row up comes after its tokens, none of which sees it
        count[len(ids) - n_scored : len(ids)] = True
    n_logits = longest - int(counts.any(0).argmax())
    ids, counts = (torch.from_numpy(array).to(model.device) for array in (rows, counts))
    logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=n_logits).logits[:, -n_logits:]
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for row_logits, row, count in zip(logits, ids[:, -n_logits:], counts[:, -n_logits:], strict=True):
        total -= F.cross_entropy(row_logits[count], row[count], reduction="none").double().sum()
    return total


def _window_sizes(context: int | None, options: RollingOptions) -> tuple[int, int]:
    seq_len = context if options.seq_len is None else options.seq_len
    if seq_len is None:
        raise CocomixError("this model knows no limit to its context: name the tokens of a window with --seq-len")
    if not 1 <= seq_len <= (context or seq_len):
        raise CocomixError(f"--seq-len is {seq_len}: this model takes windows of 1 to {context} tokens")
    stride = seq_len if options.stride is None else options.stride
    if not 1 <= stride <= seq_len:
        raise CocomixError(f"--stride is {stride}: expected 1 to {seq_len}, the tokens of a window")
    return seq_len, stride


def _open_texts(options: RollingOptions) -> list[Source]:
    settings = DataConfig(text=list(options.texts), text_key=options.text_key, folder=os.devnull)  # no token files here
    with _named_as_options():
        sources = open_sources(settings)
        for source in sources:
            require_text(source)
    return sources


@contextlib.contextmanager
def _named_as_options():
    """Errors of sources name the settings of `cocomix data`; here they are options."""
    try:
        yield
    except CocomixError as error:
        message = str(error).replace("set data.text_key", "name it with --text-key")
        message = message.replace(HOW_TO_SKIP, "").replace("or take it out of data.text", "or leave it out")
        raise CocomixError(re.sub("^data.text: ", "--text: ", message)) from error


def _require_tokenizer(folder: Path) -> None:
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise CocomixError(
            f"{folder} holds no tokenizer, which texts need: put the tokenizer there that the model was "
            "trained with (tokenizer.json and tokenizer_config.json)"
        )


def _line(checkpoint, score: RollingScore, seq_len: int, stride: int) -> str:
    windows = f"windows of {_count(seq_len, 'token')}" + (f", stride {stride:,}" if stride < seq_len else "")
    sizes = ", ".join(_count(getattr(score, f"{what}s"), what) for what in ("token", "word", "byte", "document"))
    return (
        f"{checkpoint}: perplexity {score.token_perplexity:.2f} by token, {score.word_perplexity:.6g} by word, "
        f"{score.byte_perplexity:.4f} by byte; {score.bits_per_byte:.4f} bits per byte ({sizes}; {windows})"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
