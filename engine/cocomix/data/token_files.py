"""Token files, read in windows: flat little-endian uint16, or uint32 where there are more than 65,536 ids; every
document is followed by the end-of-text token."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from tqdm import tqdm

from cocomix.core.block_sums import SUM_DTYPE, BlockSums, block_count
from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_write, read_json
from cocomix.core.mapped_file import MappedFile
from cocomix.core.output import note_once
from cocomix.core.records import FileName, Positive, as_record
from cocomix.data.left_out import LeftOut
from cocomix.data.tokenizer import MAX_VOCAB, load_tokenizer, token_dtype

FORMAT = 1

SPLITS = ("train", "val")

_SCAN_TOKENS = 1 << 24


def scan(path, dtype: np.dtype, start: int = 0) -> Iterator[np.ndarray]:
    """The tokens of a file from number `start` on, in parts of at most `_SCAN_TOKENS`."""
    with open(path, "rb") as file:
        file.seek(start * dtype.itemsize)
        while len(tokens := np.fromfile(file, dtype, _SCAN_TOKENS)):
            yield tokens


@dataclass(frozen=True)
class SplitRecord:
    """A token file: its name, tokens, documents, bytes of text and SHA-256. `sums` names the file with the checksums of
    its blocks; earlier versions made none."""

    file: FileName
    tokens: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str
    documents: Annotated[int, msgspec.Meta(ge=0)] = 0
    text_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    sums: FileName | None = None


@dataclass(frozen=True)
class TokenMeta:
    """meta.json of a folder of token files. `settings` and `sources` say what they were made from, `left_out` what of
    that is not in them, or not as it stands; None: an earlier version did not count it."""

    format: int
    vocab_size: Annotated[int, msgspec.Meta(gt=0, le=MAX_VOCAB)]
    eot_id: Annotated[int, msgspec.Meta(ge=0)]
    splits: dict[str, SplitRecord]
    val_unigram_perplexity: Positive
    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    dtype: str = "uint16"
    left_out: list[LeftOut] | None = None


def describe_split(folder: Path, name: str, counts: dict[str, int], dtype: np.dtype) -> SplitRecord:
    """The record of the token file `name`.bin in `folder`, from one reading of it, which also writes the checksums of
    its blocks beside it. `counts`: tokens, documents and text_bytes."""
    digest, sums = hashlib.sha256(), BlockSums()
    for tokens in scan(folder / f"{name}.bin", dtype):
        digest.update(tokens.data)
        sums.update(tokens.data.cast("B"))
    with atomic_write(folder / f"{name}.sums") as file:
        file.write(sums.digest())
    return SplitRecord(f"{name}.bin", sha256=digest.hexdigest(), sums=f"{name}.sums", **counts)


class TokenFiles:
    """A folder that `prepare` made. `meta` is its meta.json, `eot_id` the id of the end-of-text token."""

    def __init__(self, folder: Path, meta: TokenMeta):
        self.folder, self.meta = folder, meta
        self.vocab_size, self.eot_id = meta.vocab_size, meta.eot_id

    @classmethod
    def open(cls, folder) -> "TokenFiles":
        """Read meta.json. Raises `CocomixError` when it is missing, broken, damaged or of another format."""
        folder = Path(folder)
        meta = read_json(folder / "meta.json", "the description of the token files (`cocomix data` makes them)")
        if meta.get("format") != FORMAT:
            raise CocomixError(
                f"{folder / 'meta.json'} has format {meta.get('format')!r}, this version of cocomix reads {FORMAT}: "
                f"{_make_again(folder)}"
            )
        record = as_record(TokenMeta, meta, folder / "meta.json", _make_again(folder))
        if record.dtype != token_dtype(record.vocab_size).name:
            raise CocomixError(
                f"{folder / 'meta.json'}: its dtype is {record.dtype!r}, but {record.vocab_size} ids are held as "
                f"{token_dtype(record.vocab_size).name}: {_make_again(folder)}"
            )
        if missing := [name for name in SPLITS if name not in record.splits]:
            raise CocomixError(f"{folder / 'meta.json'} lacks splits.{missing[0]}: {_make_again(folder)}")
        if any(split.sums is None for split in record.splits.values()):
            note_once(f"{folder} was made by an earlier version, without checksums: damage in it may go unnoticed")
        return cls(folder, record)

    def tokenizer(self):
        """The transformers tokenizer that made the token files."""
        return load_tokenizer(str(self.folder / "tokenizer"))

    def split(self, name: str) -> "TokenSplit":
        """Open "train" or "val"; see `TokenSplit` for the errors."""
        record = self.meta.splits[name]
        sums = None if record.sums is None else self.folder / record.sums
        return TokenSplit(self.folder / record.file, record.tokens, self.vocab_size, record.sha256, sums)


class TokenSplit:
    """A memory-mapped token file, read in non-overlapping windows. Pickles as a path, not as its contents.

    `fingerprint` is the SHA-256 that meta.json records; opening reads none of the tokens. `sums` is the file with the
    checksums of its blocks, which each window's are compared with when they are first read. Raises `CocomixError` when
    a file is missing, empty or not as long as `n_tokens` says.
    """

    def __init__(self, path, n_tokens: int, vocab_size: int, fingerprint: str, sums: Path | None = None):
        self.path, self.n_tokens, self.vocab_size, self.fingerprint = Path(path), n_tokens, vocab_size, fingerprint
        self._dtype = token_dtype(vocab_size)
        n_bytes, remedy = n_tokens * self._dtype.itemsize, _make_again(self.path.parent)
        self._file = MappedFile(self.path, self._dtype, n_bytes, unit="tokens", remedy=remedy)
        self.tokens = self._file.array
        self._sums = sums
        if sums is not None:
            n_sums = block_count(n_bytes) * SUM_DTYPE.itemsize
            stored = MappedFile(sums, SUM_DTYPE, n_sums, unit="checksums", remedy=remedy)
            self._file.check(n_bytes, stored.array)

    def __reduce__(self):
        return TokenSplit, (self.path, self.n_tokens, self.vocab_size, self.fingerprint, self._sums)

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
        """Read the whole file. Raises `CocomixError` for an id beyond the vocabulary or another SHA-256, and where the
        checksums beside it are not those of its blocks."""
        digest, sums, start = hashlib.sha256(), BlockSums(), 0
        with tqdm(desc=f"checking {self.path.name}", total=self.n_tokens, unit="tok", unit_scale=True, delay=1) as bar:
            for tokens in scan(self.path, self._dtype):
                self._require_known(tokens, start)
                digest.update(tokens.data)
                sums.update(tokens.data.cast("B"))
                start += len(tokens)
                bar.update(len(tokens))
        if digest.hexdigest() != self.fingerprint:
            raise CocomixError(
                f"{self.path} has changed since it was made: its SHA-256 is {digest.hexdigest()}, meta.json says "
                f"{self.fingerprint}: {_make_again(self.path.parent)}"
            )
        if self._sums is not None and self._sums.read_bytes() != sums.digest():
            raise CocomixError(f"{self._sums} is damaged: {_make_again(self.path.parent)}")

    def _require_known(self, ids: np.ndarray, start: int) -> None:
        if ids.max() >= self.vocab_size:
            position = int(np.argmax(ids >= self.vocab_size))
            raise CocomixError(
                f"{self.path}: token {start + position} has id {ids[position]}, but the vocabulary has "
                f"{self.vocab_size} ids: {_make_again(self.path.parent)}"
            )


def _make_again(folder: Path) -> str:
    return f"delete {folder} and run `cocomix data` again"
