"""Token files: flat little-endian uint16, every document followed by the end-of-text token, read in windows."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json
from cocomix.core.mapped_file import MappedFile
from cocomix.data.tokenizer import TOKEN_DTYPE, load_tokenizer

FORMAT = 1

SPLITS = ("train", "val")

_SCAN_TOKENS = 1 << 24


def scan(path, start: int = 0) -> Iterator[np.ndarray]:
    """The tokens of a file from number `start` on, in parts of at most `_SCAN_TOKENS`."""
    with open(path, "rb") as file:
        file.seek(start * TOKEN_DTYPE.itemsize)
        while len(tokens := np.fromfile(file, TOKEN_DTYPE, _SCAN_TOKENS)):
            yield tokens


class TokenFiles:
    """A folder that `prepare` made. `meta` is its meta.json, `eot_id` the id of the end-of-text token."""

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.vocab_size: int = meta["vocab_size"]
        self.eot_id: int = meta["eot_id"]

    @classmethod
    def open(cls, folder) -> "TokenFiles":
        """Read meta.json. Raises `CocomixError` when it is missing, broken or of another format."""
        folder = Path(folder)
        meta = read_json(folder / "meta.json", "the description of the token files (`cocomix data` makes them)")
        if meta.get("format") != FORMAT:
            raise CocomixError(
                f"{folder / 'meta.json'} has format {meta.get('format')!r}, this version of cocomix reads {FORMAT}: "
                f"{_make_again(folder)}"
            )
        missing = {"vocab_size", "eot_id", "splits", "val_unigram_perplexity", "settings", "sources"} - set(meta)
        if missing:
            raise CocomixError(f"{folder / 'meta.json'} lacks {', '.join(sorted(missing))}: {_make_again(folder)}")
        return cls(folder, meta)

    def tokenizer(self):
        """The transformers tokenizer that made the token files."""
        return load_tokenizer(str(self.folder / "tokenizer"))

    def split(self, name: str) -> "TokenSplit":
        """Open "train" or "val"; see `TokenSplit` for the errors."""
        entry = self.meta["splits"][name]
        return TokenSplit(self.folder / entry["file"], entry["tokens"], self.vocab_size, entry["sha256"])


class TokenSplit:
    """A memory-mapped token file, read in non-overlapping windows. Pickles as a path, not as its contents.

    `fingerprint` is the SHA-256 that meta.json records; opening reads none of the tokens. Raises `CocomixError` when
    the file is missing, empty or not as long as `n_tokens` says.
    """

    def __init__(self, path, n_tokens: int, vocab_size: int, fingerprint: str):
        self.path, self.n_tokens, self.vocab_size, self.fingerprint = Path(path), n_tokens, vocab_size, fingerprint
        self._file = MappedFile(
            self.path, TOKEN_DTYPE, n_tokens * TOKEN_DTYPE.itemsize, unit="tokens", remedy=_make_again(self.path.parent)
        )
        self.tokens = self._file.array

    def __reduce__(self):
        return TokenSplit, (self.path, self.n_tokens, self.vocab_size, self.fingerprint)

    def n_windows(self, seq_len: int) -> int:
        """Whole windows of `seq_len` tokens; what is left over at the end is never read. At least 1, or an error."""
        if self.n_tokens < seq_len:
            raise CocomixError(
                f"{self.path} has {self.n_tokens:,} tokens, fewer than one window of data.seq_len={seq_len}: "
                "give more text or lower data.seq_len"
            )
        return self.n_tokens // seq_len

    def window(self, index: int, seq_len: int) -> np.ndarray:
        """Tokens `index * seq_len` and the `seq_len - 1` after it, int64 [seq_len].

        Raises `CocomixError` for an id beyond the vocabulary.
        """
        return self.windows(range(index, index + 1), seq_len)[0]

    def windows(self, indices: range, seq_len: int) -> np.ndarray:
        """Consecutive windows, read in one go: int64 [len(indices), seq_len]; see `window`."""
        if not 0 <= indices.start < indices.stop <= self.n_windows(seq_len):
            raise IndexError(f"windows {indices.start} to {indices.stop - 1} of {self.n_windows(seq_len)}")
        start = indices.start * seq_len
        ids = self._file.read(start, len(indices) * seq_len)
        self._require_known(ids, start)
        return ids.reshape(len(indices), seq_len)

    def verify(self) -> None:
        """Read the whole file. Raises `CocomixError` for an id beyond the vocabulary or another SHA-256."""
        digest, start = hashlib.sha256(), 0
        for tokens in scan(self.path):
            self._require_known(tokens, start)
            digest.update(tokens.data)
            start += len(tokens)
        if digest.hexdigest() != self.fingerprint:
            raise CocomixError(
                f"{self.path} has changed since it was made: its SHA-256 is {digest.hexdigest()}, meta.json says "
                f"{self.fingerprint}: {_make_again(self.path.parent)}"
            )

    def _require_known(self, ids: np.ndarray, start: int) -> None:
        if ids.max() >= self.vocab_size:
            position = int(np.argmax(ids >= self.vocab_size))
            raise CocomixError(
                f"{self.path}: token {start + position} has id {ids[position]}, but the vocabulary has "
                f"{self.vocab_size} ids: {_make_again(self.path.parent)}"
            )


def _make_again(folder: Path) -> str:
    return f"delete {folder} and run `cocomix data` again"
