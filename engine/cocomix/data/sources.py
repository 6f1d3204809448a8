"""Where text comes from: files, folders, globs, JSONL, Parquet, the standard library, Hugging Face datasets, mixtures.

Every source streams its documents, so memory depends neither on the size of the corpus nor on that of its largest file.
"""

import codecs
import contextlib
import glob
import hashlib
import json
import math
import os
import platform
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol, cast

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.core.extras import needs

_BLOCK_CHARS = 1 << 17  # of a plain text file that are read at a time
_PARQUET_ROWS = 256  # that are read at a time
_PARQUET_BYTES = 1 << 25  # of rows that are read together
_LINE_BYTES = 1 << 27  # of a JSONL record
_JSONL = (".jsonl", ".jsonl.gz", ".json.gz")
_PARQUET = (".parquet",)
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_ENTRY_KEYS = ("path", "weight", "text_key")


class Source(Protocol):
    """One entry of `data.text`."""

    @property
    def name(self) -> str:
        """What the config calls it."""
        ...

    @property
    def plain_bytes(self) -> int | None:
        """Size of the text where it is known without reading it."""
        ...

    @property
    def parts(self) -> Sequence["Source"]:
        """Of a mixture."""
        ...

    @property
    def ended_with(self) -> str | None:
        """The part of a mixture that was used up first, once all documents have been read."""
        ...

    def fingerprint(self) -> dict:
        """What tells this text from another, JSON-serialisable."""
        ...

    def documents(self) -> Iterator[Iterable[str]]:
        """Every document as consecutive strings, to be read before the next document is asked for."""
        ...


def open_sources(config: DataConfig) -> list[Source]:
    """Resolve every entry of `config.text` without reading any text.

    An entry is a name, or a mapping with `path` (the name), `weight` and `text_key` (in place of `config.text_key`).
    With weights, all entries become one source, a mixture. Raises `CocomixError` when there is no entry, for a path
    that does not exist, a folder without files, and an entry that means nothing.
    """
    if not config.text:
        raise CocomixError('data.text names no text: list files, folders, "stdlib" or "hf:NAME" there')
    entries = [_read_entry(entry) for entry in config.text]
    sources = [
        _open_source(entry["path"], replace(config, text_key=entry.get("text_key", config.text_key)))
        for entry in entries
    ]
    weights: list[Any] = [entry.get("weight") for entry in entries]
    if all(weight is None for weight in weights):
        return sources
    if None in weights:
        raise CocomixError(
            f"data.text: {entries[weights.index(None)]['path']} has no weight but others have: give "
            "every entry a weight, or none"
        )
    return [_Mixture(sources, weights)]


def _read_entry(entry) -> dict:
    """An entry of `data.text` as a mapping."""
    if isinstance(entry, str):
        return {"path": entry}
    example = "expected a name, or a mapping such as {path: a.jsonl, weight: 0.7, text_key: body}"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise CocomixError(f"data.text: {entry!r} names no text: {example}")
    unknown = sorted(set(entry) - set(_ENTRY_KEYS))
    if unknown:
        raise CocomixError(f"data.text: {entry['path']} has the unknown key {unknown[0]}: {example}")
    weight = entry.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and math.isfinite(weight) and weight > 0):
        raise CocomixError(f"data.text: the weight of {entry['path']} is {weight!r}: expected a positive number")
    return entry


class _Mixture:
    """Documents of several sources in turn, so that each makes up its share of the text, in characters, all along.

    The next document always comes from the source that is furthest behind its share. The mixture ends with the first
    source that has no more: what is left of the others stays out, and nothing comes twice. A pure function of the texts
    and weights.
    """

    plain_bytes = None
    ended_with: str | None = None

    def __init__(self, sources: list[Source], weights: list[float]):
        self.parts, self._weights = sources, weights
        self.name = "the mixture of " + ", ".join(source.name for source in sources)

    def fingerprint(self) -> dict:
        parts = [
            {**source.fingerprint(), "weight": weight} for source, weight in zip(self.parts, self._weights, strict=True)
        ]
        return {"source": self.name, "parts": parts}

    def documents(self) -> Iterator[Iterable[str]]:
        streams, read = [source.documents() for source in self.parts], [0] * len(self.parts)

        def counted(strings, number):
            for string in strings:
                read[number] += len(string)
                yield string

        while True:
            number = min(range(len(read)), key=lambda i: (read[i] / self._weights[i], i))
            document = next(streams[number], None)
            if document is None:
                self.ended_with = self.parts[number].name
                return
            yield counted(document, number)


def _open_source(name: str, config: DataConfig) -> Source:
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, skip=_NOT_STDLIB) if path.suffix == ".py"]
        return _LocalFiles(f"stdlib of Python {platform.python_version()}", root, _some(name, files), config.text_key)
    if name.startswith("hf:"):
        dataset, split, subset = (name.removeprefix("hf:").split(":", 2) + ["", ""])[:3]
        return _HubDataset(name, dataset, split or "train", subset or None, config.text_key)
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


def _walk(root: Path, skip: Set[str] = frozenset()) -> Iterator[Path]:
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
    parts = ()
    ended_with = None

    @property
    def plain_bytes(self) -> int | None:
        if any(path.name.endswith(_JSONL + _PARQUET) for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> dict:
        return {"source": self.name, **_listing(self.root, self.files)}

    def documents(self) -> Iterator[Iterable[str]]:
        for path in self.files:
            if path.name.endswith(_JSONL):
                yield from _read_jsonl(path, self.text_key)
            elif path.name.endswith(_PARQUET):
                yield from _read_parquet(path, self.text_key)
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
        while text := file.read(_BLOCK_CHARS):
            yield text


def _read_jsonl(path: Path, text_key: str) -> Iterator[list[str]]:
    from fsspec.implementations.local import LocalFileSystem

    with _explain_unreadable(path), LocalFileSystem().open(str(path), "rb", compression="infer") as file:
        for number, line in enumerate(_lines(cast(IO[bytes], file), path), start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise CocomixError(f"{path}, line {number}: not JSON: {error}") from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                found = f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is not an object"
                raise CocomixError(
                    f"{path}, line {number}: no text in the field {text_key!r}; {found}; set data.text_key"
                )
            yield [text]


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Lines of bounded length: a small compressed file can hold one that no memory does."""
    number = 0
    while line := file.readline(_LINE_BYTES + 1):
        number += 1
        if len(line) > _LINE_BYTES:
            raise CocomixError(
                f"{path}, line {number}: longer than {_LINE_BYTES / 2**20:,.0f} MiB; a record is a line: split it"
            )
        yield line


def _read_parquet(path: Path, text_key: str) -> Iterator[list[str]]:
    with needs(str(path), "pyarrow", "cocomix[data]"):
        import pyarrow
        from pyarrow import parquet
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow
        if text_key not in columns.names:
            raise CocomixError(
                f"{path}: no column {text_key!r}; its columns are {', '.join(columns.names)}; set data.text_key"
            )
        kind = columns.field(text_key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise CocomixError(f"{path}: column {text_key!r} holds {kind}, not text; set data.text_key")
        for rows in file.iter_batches(_rows_at_once(file.metadata), columns=[text_key]):
            for text in rows.column(0).to_pylist():
                yield [text or ""]
    except (pyarrow.ArrowException, OSError) as error:
        raise CocomixError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _rows_at_once(metadata: Any) -> int:
    """Rows of a Parquet file that are read together: fewer where they are large."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1.0)
    return max(1, min(_PARQUET_ROWS, int(_PARQUET_BYTES / max(largest, 1.0))))


@dataclass(frozen=True)
class _HubDataset:
    name: str
    dataset: str
    split: str
    subset: str | None
    text_key: str
    plain_bytes: int | None = None
    parts = ()
    ended_with = None

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
        with needs(self.name, "Hugging Face datasets", "cocomix[data]"):
            import datasets

        try:
            yield from datasets.load_dataset(self.dataset, self.subset, split=self.split, streaming=True)
        except Exception as error:  # the library and its readers have no common base exception
            raise CocomixError(f"{self.name} cannot be loaded: {error}") from error
