"""Text -> token ids: sources (files, folders, globs, JSONL, the standard library, Hugging Face datasets), tokenizers.

Documents stream, and reach the tokenizer in pieces of bounded length, so memory depends neither on the size of the
corpus nor on that of its largest file.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import json
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from cocomix.config import DataConfig
from cocomix.errors import CocomixError

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 1 << 17
TOKEN_DTYPE = np.dtype("<u2")
_MAX_VOCAB = 1 << 16
_MIN_BPE_VOCAB = 257  # 256 bytes and the end-of-text token
_BATCH_CHARS = 1 << 21
_JSONL = (".jsonl", ".jsonl.gz", ".json.gz")
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
# A GPT-2 style pre-tokenizer splits at both places whatever surrounds them, so a cut there changes no token.
_LINE_END = re.compile(r"(?<=\S\n)(?=\S)")
_WORD_END = re.compile(r"(?<=\S)(?= \S)")
_CUT_SEARCH_CHARS = 1 << 14


class Piece(NamedTuple):
    """A stretch of at most `PIECE_CHARS` characters of document number `document` (0-based over all sources)."""

    document: int
    text: str
    last: bool  # it ends its document


class Source(Protocol):
    """One entry of `data.text`."""

    name: str
    plain_bytes: int | None  # size of the text where it is known without reading it

    def fingerprint(self) -> dict:
        """What tells this text from another, JSON-serialisable."""

    def documents(self) -> Iterator[Iterable[str]]:
        """Every document as consecutive strings, to be read before the next document is asked for."""


def open_sources(config: DataConfig) -> list[Source]:
    """Resolve every entry of `config.text` without reading any text.

    Raises `CocomixError` when there is no entry, and for a path that does not exist or a folder without files.
    """
    if not config.text:
        raise CocomixError('data.text names no text: list files, folders, "stdlib" or "hf:NAME" there')
    return [_open_source(name, config) for name in config.text]


def require_text(source: Source) -> None:
    """Raise `CocomixError` unless the source yields at least one document; reads no further than that one."""
    if next(pieces([source]), None) is None:
        raise CocomixError(f"{source.name}: there is no text in it (only empty or binary files or records)")


def pieces(sources: Iterable[Source]) -> Iterator[Piece]:
    """Stream all documents in order. Documents of nothing but white space are left out and not numbered."""
    document = 0
    for source in sources:
        for strings in source.documents():
            held = None
            for text in _cut(strings):
                if held is not None:
                    yield Piece(document, held, last=False)
                held = text
            if held is not None:
                yield Piece(document, held, last=True)
                document += 1


def _cut(strings: Iterable[str]) -> Iterator[str]:
    rest, first = "", True
    for string in strings:
        for start in range(0, len(string), PIECE_CHARS):
            rest += string[start:start + PIECE_CHARS]
            while len(rest) > PIECE_CHARS:
                end = _cut_position(rest)
                yield _without_lone_surrogates(rest[:end])
                rest, first = rest[end:], False
    if not first or rest.strip():
        yield _without_lone_surrogates(rest)


def _cut_position(text: str) -> int:
    start = max(1, PIECE_CHARS - _CUT_SEARCH_CHARS)
    for boundary in (_LINE_END, _WORD_END):
        ends = [match.start() for match in boundary.finditer(text, start, PIECE_CHARS)]
        if ends:
            return ends[-1]
    return PIECE_CHARS


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; UTF-8 cannot
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _open_source(name: str, config: DataConfig) -> Source:
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, skip=_NOT_STDLIB) if path.suffix == ".py"]
        return _LocalFiles(f"stdlib of Python {platform.python_version()}", root, _some(name, files), config.text_key)
    if name.startswith("hf:"):
        dataset, _, split = name.removeprefix("hf:").partition(":")
        return _HubDataset(name, dataset, split or "train", config.text_key)
    path = Path(name).expanduser()
    if path.is_file():
        return _LocalFiles(name, path.parent, [path], config.text_key, skip_binary=False)
    if path.is_dir():
        files, root = list(_walk(path)), path
    elif glob.has_magic(name):
        files, root = list(_expand(str(path))), None
    else:
        raise CocomixError(f"data.text: there is no file or folder {name}")
    made_here = Path(config.folder).resolve()
    files = [file for file in files if made_here not in file.resolve().parents]
    return _LocalFiles(name, root, _some(name, files), config.text_key)


def _some(name: str, files: list[Path]) -> list[Path]:
    if not files:
        raise CocomixError(f"data.text: there are no text files in {name}")
    return files


def _walk(root: Path, skip: set[str] = frozenset()) -> Iterator[Path]:
    def refuse(error: OSError):
        raise CocomixError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in skip)
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _expand(pattern: str) -> Iterator[Path]:
    for match in sorted(glob.glob(pattern, recursive=True)):
        path = Path(match)
        if path.is_file():
            yield path
        elif path.is_dir() and "**" not in pattern:  # ** names the folders' contents as well
            yield from _walk(path)


def _listing(root: Path | None, files: list[Path]) -> dict:
    digest, total = hashlib.sha256(), 0
    for path in files:
        with _explain_unreadable(path):
            status = path.stat()
        digest.update(os.fsencode(os.path.relpath(path, root) if root else path))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        total += status.st_size
    return {"files": len(files), "bytes": total, "sha256_of_listing": digest.hexdigest()}


@dataclass(frozen=True)
class _LocalFiles:
    name: str
    root: Path | None  # what the fingerprint names files relative to
    files: list[Path]
    text_key: str
    skip_binary: bool = True

    @property
    def plain_bytes(self) -> int | None:
        if any(path.name.endswith(_JSONL) for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> dict:
        return {"source": self.name, **_listing(self.root, self.files)}

    def documents(self) -> Iterator[Iterable[str]]:
        for path in self.files:
            if path.name.endswith(_JSONL):
                yield from _read_jsonl(path, self.text_key)
            elif _is_text(path):
                yield _read_text(path)
            elif not self.skip_binary:
                raise CocomixError(f"{path} is not UTF-8 text: convert it, or take it out of data.text")


@contextlib.contextmanager
def _explain_unreadable(path: Path):
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise CocomixError(f"{path} cannot be read: {error}") from error


def _is_text(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _explain_unreadable(path), open(path, "rb") as file:
        try:
            while block := file.read(1 << 20):
                if "\0" in decoder.decode(block):
                    return False
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _read_text(path: Path) -> Iterator[str]:
    with _explain_unreadable(path), open(path, encoding="utf-8-sig", newline="") as file:
        while text := file.read(PIECE_CHARS):
            yield text


def _read_jsonl(path: Path, text_key: str) -> Iterator[list[str]]:
    with _explain_unreadable(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise CocomixError(f"{path}, line {number}: not JSON: {error}") from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                found = f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is no object"
                raise CocomixError(
                    f"{path}, line {number}: no text in the field {text_key!r}; {found}; set data.text_key"
                )
            yield [text]


@dataclass(frozen=True)
class _HubDataset:
    name: str
    dataset: str
    split: str
    text_key: str
    plain_bytes: int | None = None

    def fingerprint(self) -> dict:
        folder = Path(self.dataset)
        return {"source": self.name, **(_listing(folder, list(_walk(folder))) if folder.is_dir() else {})}

    def documents(self) -> Iterator[list[str]]:
        for number, row in enumerate(self._rows()):
            if self.text_key not in row:
                raise CocomixError(
                    f"{self.name}: no column {self.text_key!r}; its columns are {', '.join(row)}; set data.text_key"
                )
            text = row[self.text_key]
            if not isinstance(text, str | None):
                raise CocomixError(
                    f"{self.name}, row {number}: column {self.text_key!r} holds {type(text).__name__}, not text; "
                    "set data.text_key"
                )
            yield [text or ""]

    def _rows(self) -> Iterator[dict]:
        import datasets

        try:
            yield from datasets.load_dataset(self.dataset, split=self.split, streaming=True)
        except Exception as error:  # the library and its readers have no common base exception
            raise CocomixError(f"{self.name} cannot be loaded: {error}") from error


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
        vocab_size=vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def load_tokenizer(name: str):
    """The transformers tokenizer of a folder or hub name. Raises `CocomixError` when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers, the hub client and tokenizers have no common base exception
        raise CocomixError(f"the tokenizer {name} cannot be loaded: {error}") from error


def vocab_size_of(tokenizer) -> int:
    """Highest id plus one. Raises `CocomixError` for a tokenizer that cannot make token files."""
    where = f"the tokenizer {tokenizer.name_or_path}"
    if not tokenizer.is_fast:
        raise CocomixError(f"{where} has no fast version (tokenizer.json): choose a tokenizer that has one")
    if tokenizer.eos_token_id is None:
        raise CocomixError(f"{where} has no end-of-text token: set its eos_token, or choose another tokenizer")
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    if vocab_size > _MAX_VOCAB:
        raise CocomixError(f"{where} has {vocab_size} ids: token files hold uint16, which is at most {_MAX_VOCAB} ids")
    return vocab_size


def tokenize(stream: Iterable[Piece], tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    """Token ids (uint16) of every piece, the end-of-text token included where a document ends.

    Pieces of one document are encoded apart. They end where GPT-2 style tokenizers split anyway; a tokenizer that
    puts a space before every text puts one before every piece.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
    encoder.no_truncation()
    encoder.no_padding()
    for batch in _batches(stream):
        encodings = encoder.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            ids = encoding.ids
            if piece.last:
                ids.append(tokenizer.eos_token_id)
            yield piece, np.array(ids, dtype=TOKEN_DTYPE)


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, chars = [], 0
    for piece in stream:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
