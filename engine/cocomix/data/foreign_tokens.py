"""Token files of other programs: flat ones as nanoGPT, llm.c and OLMo-core keep them, Megatron's with their index, and
NumPy's arrays. Which one a file is, is told by how it begins and by what lies beside it.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cocomix.core.errors import CocomixError
from cocomix.data.left_out import EMPTY, Tally
from cocomix.data.opening import explain_unreadable, packing_of
from cocomix.data.sources import file_listing
from cocomix.data.tokenizer import token_dtype

_ENDINGS = (".bin", ".npy")
_NOT_TOKENS = "not a token file (.bin or .npy)"
_SIDES = {"train": "train", "val": "val", "valid": "val", "validation": "val"}  # by words of a file's name
_READ_TOKENS = 1 << 20
_LOOK_BYTES = 1 << 16  # of a file, that tell what it is
_TELLING_NUMBERS = 64
_TEXT_BYTES = bytes({*range(32, 127), 9, 10, 13})
# llm.c: 256 numbers of 32 bits, of which the first are this, a version and how many tokens follow
_LLMC_HEADER_BYTES = 1024
_LLMC_DTYPES = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}  # of GPT-2's tokens, of Llama 3's
_NPY = b"\x93NUMPY"
_MEGATRON, _OLD_MEGATRON = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_MEGATRON_VERSION = 1
_MEGATRON_HEAD_BYTES = 34  # magic, version, code of a type, sequences, documents
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # its codes of types of whole numbers


class TokenPiece(NamedTuple):
    """A stretch of document number `document` (0-based over all files): `ids` as token files hold them, with the
    end-of-text token where it is the `last` one. `side` is "train" or "val" where the file's name says so."""

    document: int
    ids: np.ndarray
    last: bool
    side: str | None


@dataclass(frozen=True)
class ForeignTokens:
    """A token file: `count` numbers of `dtype` from byte `offset` on. `ends` holds, in tokens, where each of its
    documents ends, beside those that an end-of-text token ends; None where nothing else does."""

    path: Path
    dtype: np.dtype
    offset: int
    count: int
    ends: np.ndarray | None = None

    def __str__(self) -> str:
        documents = "" if self.ends is None else f", {len(self.ends):,} documents by its index"
        side = "" if self.side is None else f", for {self.side}"
        return f"{self.path}: {self.count:,} tokens as {self.dtype.name}{documents}{side}"

    @property
    def side(self) -> str | None:
        """What its name says it is for, "train" or "val"."""
        found = {_SIDES[word] for word in re.split(r"[^a-z]+", self.path.name.lower()) if word in _SIDES}
        return found.pop() if len(found) == 1 else None

    def parts(self) -> Iterator[tuple[int, np.ndarray, bool]]:
        """All of it in order, bounded in length: number of the first token, tokens, whether a document ends there."""
        ends = np.array([self.count]) if self.ends is None else self.ends
        with explain_unreadable(self.path), open(self.path, "rb") as file:
            file.seek(self.offset)
            start = 0
            while len(tokens := np.fromfile(file, self.dtype, min(_READ_TOKENS, self.count - start))):
                inside = ends[
                    np.searchsorted(ends, start, "right") : np.searchsorted(ends, start + len(tokens), "right")
                ]
                cuts = [0, *(inside - start).tolist()]
                for first, last in zip(cuts, cuts[1:], strict=False):
                    yield start + first, tokens[first:last], True
                if cuts[-1] < len(tokens):
                    yield start + cuts[-1], tokens[cuts[-1] :], False
                start += len(tokens)


class TokenSources:
    """The token files that `data.tokens` names, of a tokenizer with `vocab_size` ids.

    An entry is a file, or a folder, whose `.bin` and `.npy` files are taken in the order of their names. Flat files
    hold uint16 where the ids fit, else uint32. Raises `CocomixError` where there is none, and for a file of another
    kind.
    """

    def __init__(self, entries: list[str], vocab_size: int):
        self.vocab_size = vocab_size
        self.tallies = [Tally(entry) for entry in entries]
        self._names = entries
        self._paths = [_token_files(entry, tally) for entry, tally in zip(entries, self.tallies, strict=True)]
        self.files = [[_open(path, vocab_size) for path in paths] for paths in self._paths]
        if {file.side for files in self.files for file in files} == {"val"}:
            raise CocomixError(f"data.tokens: {', '.join(entries)} holds validation tokens alone: name the others too")

    @property
    def n_tokens(self) -> int:
        """In all files, padding and end-of-text tokens included."""
        return sum(file.count for files in self.files for file in files)

    def fingerprints(self) -> list[dict]:
        """What tells these files from others, JSON-serialisable, one for each entry."""
        return [
            {"source": name, **file_listing(paths[0].parent, [*paths, *_indices(paths)])}
            for name, paths in zip(self._names, self._paths, strict=True)
        ]

    def pieces(self, eot_id: int) -> Iterator[TokenPiece]:
        """All documents in order. A document ends with the end-of-text token, with its file, and where Megatron's index
        says so. Those of no tokens are left out and counted. Raises `CocomixError` for an id beyond the vocabulary."""
        document = 0
        for files, tally in zip(self.files, self.tallies, strict=True):
            for file in files:
                for ids, last in self._documents(file, eot_id, tally):
                    yield TokenPiece(document, ids, last, file.side)
                    document += last

    def _documents(self, file: ForeignTokens, eot_id: int, tally: Tally) -> Iterator[tuple[np.ndarray, bool]]:
        has_begun = False
        for first, raw, ends in file.parts():
            ids = self._known(file, first, raw)
            start = 0
            for end in np.flatnonzero(ids == eot_id).tolist():
                if end > start or has_begun:
                    yield ids[start : end + 1], True
                else:
                    tally.add(EMPTY, f"{file.path}, token {first + end}")
                start, has_begun = end + 1, False
            rest = ids[start:]
            if ends and (len(rest) or has_begun):
                yield np.append(rest, rest.dtype.type(eot_id)), True
                has_begun = False
            elif len(rest):
                yield rest, False
                has_begun = True

    def _known(self, file: ForeignTokens, first: int, raw: np.ndarray) -> np.ndarray:
        unknown = (raw < 0) | (raw >= self.vocab_size)
        if unknown.any():
            place = int(unknown.argmax())
            raise CocomixError(
                f"{file.path}: token {first + place} has id {raw[place]}, but data.tokenizer has {self.vocab_size} "
                f"ids: name the tokenizer that made the file (it is read as {file.dtype.name})"
            )
        return raw.astype(token_dtype(self.vocab_size))


def _indices(paths: list[Path]) -> list[Path]:
    return [index for path in paths if (index := path.with_suffix(".idx")).is_file()]


def _token_files(entry: str, tally: Tally) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CocomixError(f"data.tokens: there is no file or folder {entry}")
    with explain_unreadable(path):
        present = sorted(found for found in path.iterdir() if found.is_file())
    files = [found for found in present if found.suffix in _ENDINGS]
    indices = {found.with_suffix(".idx") for found in files}
    for found in present:
        if found not in files and found not in indices:
            tally.add(_NOT_TOKENS, found)
    if not files:
        raise CocomixError(f"data.tokens: there are no token files (.bin or .npy) in {entry}")
    return files


def _open(path: Path, vocab_size: int) -> ForeignTokens:
    with explain_unreadable(path), open(path, "rb") as file:
        start = file.read(_LOOK_BYTES)
        size = os.fstat(file.fileno()).st_size
    if path.suffix == ".idx":
        raise CocomixError(f"data.tokens: {path} is an index: name the .bin file that it is of")
    if packing_of(start) is not None:
        raise CocomixError(f"data.tokens: {path} is packed: unpack it")
    if not start.translate(None, _TEXT_BYTES):
        raise CocomixError(f"data.tokens: {path} holds {'text' if start else 'nothing'}: name text as data.text")
    index = path.with_suffix(".idx")
    if index.is_file():
        return _open_megatron(path, index, size)
    if start.startswith(_NPY):
        return _open_npy(path)
    if len(start) >= _LLMC_HEADER_BYTES:
        magic, _, count = np.frombuffer(start, "<i4", 3).tolist()
        if magic in _LLMC_DTYPES:
            return _whole(path, _LLMC_DTYPES[magic], _LLMC_HEADER_BYTES, size, count)
    dtype = token_dtype(vocab_size)
    return _whole(path, np.dtype("<u4") if dtype.itemsize == 2 and _is_of_32_bits(start, size) else dtype, 0, size)


def _is_of_32_bits(start: bytes, size: int) -> bool:
    """Whether small numbers of 32 bits stand there, whose upper halves are all zero; too few numbers do not tell."""
    halves = np.frombuffer(start[: len(start) // 4 * 4], "<u2")
    return size % 4 == 0 and len(halves) >= _TELLING_NUMBERS and not halves[1::2].any() and bool(halves[0::2].any())


def _whole(path: Path, dtype: np.dtype, offset: int, size: int, count: int | None = None) -> ForeignTokens:
    found, left = divmod(size - offset, dtype.itemsize)
    if left or (count is not None and found != count):
        expected = "a whole number of them" if count is None else f"{count:,}"
        raise CocomixError(
            f"data.tokens: {path} has {size - offset:,} bytes of tokens of {dtype.itemsize} bytes, expected "
            f"{expected}: it is damaged, or no token file"
        )
    return ForeignTokens(path, dtype, offset, found)


def _open_npy(path: Path) -> ForeignTokens:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CocomixError(f"data.tokens: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise CocomixError(
            f"data.tokens: {path} holds an array of {array.dtype} with {array.ndim} dimensions: expected whole numbers "
            "in one"
        )
    return ForeignTokens(path, array.dtype, array.offset, len(array))


def _open_megatron(path: Path, index: Path, size: int) -> ForeignTokens:
    with explain_unreadable(index):
        content = np.fromfile(index, dtype=np.uint8)
    dtype, lengths, pointers, documents = _read_index(index, content[:_MEGATRON_HEAD_BYTES].tobytes(), content)
    ends = np.cumsum(lengths, dtype=np.int64)
    if len(ends) and (lengths.min() < 0 or (pointers != (ends - lengths) * dtype.itemsize).any()):
        raise CocomixError(f"data.tokens: {index} is damaged: its sequences do not follow one another")
    if len(documents) and (documents[0] != 0 or documents[-1] != len(ends) or (np.diff(documents) < 0).any()):
        raise CocomixError(f"data.tokens: {index} is damaged: its documents do not follow one another")
    total = int(ends[-1]) if len(ends) else 0
    sequences = documents[1:][np.diff(documents) > 0]  # where each document that has any ends
    return _with_ends(_whole(path, dtype, 0, size, total), ends[sequences - 1])


def _with_ends(file: ForeignTokens, ends: np.ndarray) -> ForeignTokens:
    return ForeignTokens(file.path, file.dtype, file.offset, file.count, np.unique(ends[ends > 0]))


def _read_index(index: Path, head: bytes, content: np.ndarray):
    """The type of the tokens, and of each sequence its length and first byte, and where documents begin among them."""
    if head.startswith(_OLD_MEGATRON):
        raise CocomixError(f"data.tokens: {index} is of Megatron's older form: convert it with `--dataset-impl mmap`")
    code = head[17] if len(head) == _MEGATRON_HEAD_BYTES else None
    is_known = head.startswith(_MEGATRON) and int.from_bytes(head[9:17], "little") == _MEGATRON_VERSION
    if not is_known or code not in _MEGATRON_DTYPES:
        raise CocomixError(f"data.tokens: {index} is no index of Megatron's, or it is damaged or of other numbers")
    n_sequences, n_documents = (int(number) for number in np.frombuffer(head[18:], "<u8"))
    expected = len(head) + 12 * n_sequences + 8 * n_documents
    if len(content) not in (expected, expected + n_sequences):  # with a byte a sequence for how it is used
        raise CocomixError(f"data.tokens: {index} has {len(content):,} bytes, expected {expected:,}: it is damaged")
    parts, start = [], len(head)
    for kind, number in (("<i4", n_sequences), ("<i8", n_sequences), ("<i8", n_documents)):
        end = start + number * np.dtype(kind).itemsize
        parts.append(content[start:end].view(kind) if (end - start) else np.empty(0, kind))
        start = end
    return np.dtype(_MEGATRON_DTYPES[code]), *parts
