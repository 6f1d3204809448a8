"""What concepts do in a corpus that streams by: how often they are kept, with which weights, and where most.

Shapes: B windows of T tokens, C concepts, k kept concepts a token.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data.documents import pieces
from cocomix.data.left_out import say
from cocomix.data.sources import Source, left_out_of, open_sources
from cocomix.data.token_files import TokenFiles
from cocomix.data.tokenizing import tokenize

_BINS = 32
_TOKENS_AFTER = 8  # of a context, for the eye


class Histogram:
    """Counts of numbers that stream by, in `_BINS` equal bins; where one falls outside, pairs of bins are merged, so
    that memory stays as it is and no number is lost."""

    def __init__(self):
        self.counts = np.zeros(_BINS, dtype=np.int64)
        self.low = self.width = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count finite numbers."""
        if not len(values):
            return
        low, high = float(values.min()), float(values.max())
        if not self.width:
            self.low, self.width = low, max((high - low) / _BINS, abs(high) * 1e-3, 1e-6)
        while high >= self.low + _BINS * self.width or low < self.low:
            merged = self.counts.reshape(-1, 2).sum(1)
            rest = np.zeros_like(merged)
            if low < self.low:
                self.low -= _BINS * self.width
                self.counts = np.concatenate([rest, merged])
            else:
                self.counts = np.concatenate([merged, rest])
            self.width *= 2
        bins = np.clip(((values - self.low) / self.width).astype(np.int64), 0, _BINS - 1)
        self.counts += np.bincount(bins, minlength=_BINS)


@dataclass(frozen=True, order=True)
class Context:
    """A place where a concept was kept: its window's tokens up to that place, and a few after it."""

    weight: float
    number: int = field(repr=False)  # an earlier place wins at equal weights
    ids: np.ndarray = field(compare=False, repr=False)
    after: np.ndarray = field(compare=False, repr=False)


class Followed:
    """One concept: the weights that it was kept with, and the strongest places, at most one a window."""

    def __init__(self, n_contexts: int):
        self.histogram, self.n_contexts, self.total = Histogram(), n_contexts, 0.0
        self._heap: list[Context] = []

    def add(self, weights: np.ndarray, rows: np.ndarray, places: np.ndarray, windows: np.ndarray, number: int) -> None:
        """The places of one batch: weights [n] at positions `places` of `rows` of windows [B, T]; `number` counts the
        windows that came before."""
        self.histogram.add(weights)
        self.total += float(weights.sum())
        seen = set()
        for i in np.argsort(-weights, kind="stable"):
            if len(self._heap) == self.n_contexts and weights[i] <= self._heap[0].weight:
                return
            if rows[i] in seen:
                continue
            seen.add(rows[i])
            window, end = windows[rows[i]], places[i] + 1
            context = Context(
                float(weights[i]),
                -(number + int(rows[i])),
                window[:end].copy(),
                window[end : end + _TOKENS_AFTER].copy(),
            )
            (heapq.heappush if len(self._heap) < self.n_contexts else heapq.heapreplace)(self._heap, context)

    @property
    def contexts(self) -> list[Context]:
        """The strongest places, the strongest first."""
        return sorted(self._heap, reverse=True)


@dataclass
class Survey:
    """`fired` [C] counts the tokens at which each concept is among the kept ones, out of `n_tokens` that have a concept
    position of their own, or are predicted to where nothing is interleaved."""

    name: str
    n_tokens: int
    fired: np.ndarray
    followed: dict[int, Followed]


@torch.no_grad()
def survey(model, corpus: "Corpus", concepts: Iterable[int], n_contexts: int = 8) -> Survey:
    """Run a CoCoMix model over a corpus. Memory holds one batch, a count for each concept, and for each of `concepts`
    a histogram and `n_contexts` places, however long the corpus is. Raises `CocomixError` for an empty corpus."""
    followed = {concept: Followed(n_contexts) for concept in concepts}
    fired = np.zeros(model.config.concept_dim, dtype=np.int64)
    ids = np.array(sorted(followed), dtype=np.int64)
    at = np.arange(model.config.n_positions)[model.config.concept_tokens]  # the tokens that have a concept
    n_tokens = n_windows = 0
    for windows in corpus.batches():
        out = model.base_model(torch.from_numpy(windows).to(model.device), use_cache=False)
        values, indices = out.concept_values.float().cpu().numpy(), out.concept_indices.cpu().numpy()
        fired += np.bincount(indices.ravel(), minlength=len(fired))
        where = np.nonzero(np.isin(indices, ids))
        found, weights = indices[where], values[where]
        order = np.argsort(found, kind="stable")
        bounds = np.searchsorted(found[order], ids, side="left"), np.searchsorted(found[order], ids, side="right")
        for concept, start, end in zip(ids.tolist(), *bounds, strict=True):
            part = order[start:end]
            followed[concept].add(weights[part], where[0][part], at[where[1][part]], windows, n_windows)
        n_tokens += indices.shape[0] * indices.shape[1]
        n_windows += len(windows)
    if not n_tokens:
        raise CocomixError(f"the corpus {corpus.name} holds no text")
    return Survey(corpus.name, n_tokens, fired, followed)


class Corpus:
    """Windows of `seq_len` tokens from a folder of token files (its validation part), or from whatever `data.text`
    takes (a text file, a folder, `hf:NAME`, ...), until `max_tokens` have been read.

    Raises `CocomixError` where there is nothing, and for token files of another tokenizer.
    """

    def __init__(self, path, tokenizer, seq_len: int, max_tokens: int, batch: int = 8):
        self.name, self._tokenizer, self._seq_len = str(path), tokenizer, seq_len
        self._max_tokens, self._batch = max_tokens, batch
        self._split, self._sources = None, list[Source]()
        if (Path(path) / "meta.json").is_file():
            files = TokenFiles.open(path)
            if files.tokenizer().get_vocab() != tokenizer.get_vocab():
                raise CocomixError(
                    f"the token files in {path} were made with another tokenizer than the model's: "
                    "give text with --corpus, or token files of its own tokenizer"
                )
            self._split, self.name = files.split("val"), f"{path} (validation part)"
        else:
            self._sources = open_sources(DataConfig(text=[str(path)]))

    def batches(self) -> Iterator[np.ndarray]:
        """int64 [B, seq_len]; the last batches may be smaller, and the last window of a text shorter."""
        rows = []
        for window in self._windows():
            if rows and len(window) != len(rows[0]):
                yield np.stack(rows)
                rows = []
            rows.append(window)
            if len(rows) == self._batch:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)

    def _windows(self):
        if self._split is not None:
            n_windows = min(self._split.n_windows(self._seq_len), max(self._max_tokens // self._seq_len, 1))
            yield from (self._split.window(index, self._seq_len) for index in range(n_windows))
            return
        rest, left = np.zeros(0, dtype=np.int64), self._max_tokens
        for _, ids in tokenize(self._few_at_a_time(), self._tokenizer):
            rest = np.concatenate([rest, ids[:left].astype(np.int64)])
            left -= min(left, len(ids))
            n_whole = len(rest) // self._seq_len
            yield from rest[: n_whole * self._seq_len].reshape(n_whole, self._seq_len)
            rest = rest[n_whole * self._seq_len :]
            if not left:
                break
        if len(rest):
            yield rest
        say(left_out_of(self._sources))

    def _few_at_a_time(self):
        return itertools.islice(pieces(self._sources), self._max_tokens)  # a piece has at least one token
