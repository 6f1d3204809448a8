"""Where text comes from: files, folders, globs, the standard library, Hugging Face datasets, mixtures.

Every source streams its documents, so memory depends neither on the size of the corpus nor on that of its largest file.
"""

import glob
import hashlib
import math
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.core.extras import needs
from cocomix.data.formats import is_plainly_text, read_documents, was_always_read
from cocomix.data.left_out import LeftOut, Tally
from cocomix.data.opening import explain_unreadable

_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_ENTRY_KEYS = ("path", "weight", "text_key", "max_epochs")
FORMATS_READ = "formats"  # in a fingerprint: which kinds of files were read, where that is not those of version 0.1
_HIDDEN = "hidden"
_NO_FILE = "neither a file nor a folder"
_MADE_HERE = "file in data.folder, which is made here"


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

    @property
    def tallies(self) -> Sequence[Tally]:
        """What the last reading of this source, or of each part of a mixture, has left out so far."""
        ...

    def fingerprint(self) -> dict:
        """What tells this text from another, JSON-serialisable."""
        ...

    def documents(self) -> Iterator[Iterable[str]]:
        """Every document as consecutive strings, to be read before the next document is asked for."""
        ...


def open_sources(config: DataConfig) -> list[Source]:
    """Resolve every entry of `config.text` without reading any text.

    An entry is a name, or a mapping with `path` (the name), `weight`, `text_key` (in place of `config.text_key`) and
    `max_epochs` (how often a mixture reads it). With weights, all entries become one source, a mixture. Raises
    `CocomixError` when there is no entry, for a path that does not exist, a folder without files, and an entry that
    means nothing.
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
        if repeated := [entry["path"] for entry in entries if "max_epochs" in entry]:
            raise CocomixError(f"data.text: {repeated[0]} has max_epochs but no weight: it is for mixtures")
        return sources
    if None in weights:
        raise CocomixError(
            f"data.text: {entries[weights.index(None)]['path']} has no weight but others have: give "
            "every entry a weight, or none"
        )
    return [_Mixture(sources, weights, [entry.get("max_epochs", 1) for entry in entries])]


def left_out_of(sources: Iterable[Source]) -> list[LeftOut]:
    """What their last readings have left out."""
    return [found for source in sources for tally in source.tallies for found in tally.left_out()]


def require_few_bad(sources: Iterable[Source], max_share: float) -> None:
    """Raise `CocomixError` where a source had more than this share of bad records among those that were read."""
    for source in sources:
        for tally in source.tallies:
            tally.require_few_bad(max_share)


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
    epochs = entry.get("max_epochs", 1)
    if type(epochs) is not int or epochs < 1:
        raise CocomixError(f"data.text: max_epochs of {entry['path']} is {epochs!r}: expected a whole number from 1 on")
    return entry


class _Mixture:
    """Documents of several sources in turn, so that each makes up its share of the text, in characters, all along.

    The next document always comes from the source that is furthest behind its share. A source that has no more is read
    again, so often as `max_epochs` allows, which is once where it says nothing else. The mixture ends with the first
    one that may not be: what is left of the others stays out. A pure function of the texts, weights and epochs.
    """

    plain_bytes = None
    ended_with: str | None = None

    def __init__(self, sources: list[Source], weights: list[float], max_epochs: list[int]):
        self.parts, self._weights, self._max_epochs = sources, weights, max_epochs
        self._of_first_epochs: dict[int, Sequence[Tally]] = {}  # of sources that are being read again
        self.name = "the mixture of " + ", ".join(source.name for source in sources)

    @property
    def tallies(self) -> list[Tally]:
        found = [self._of_first_epochs.get(number, source.tallies) for number, source in enumerate(self.parts)]
        return [tally for tallies in found for tally in tallies]

    def fingerprint(self) -> dict:
        parts = [
            {**source.fingerprint(), "weight": weight, **({} if epochs == 1 else {"max_epochs": epochs})}
            for source, weight, epochs in zip(self.parts, self._weights, self._max_epochs, strict=True)
        ]
        return {"source": self.name, "parts": parts}

    def documents(self) -> Iterator[Iterable[str]]:
        streams, read = [source.documents() for source in self.parts], [0] * len(self.parts)
        epochs, begun_at = [1] * len(self.parts), [0] * len(self.parts)
        self._of_first_epochs = {}

        def counted(strings, number):
            for string in strings:
                read[number] += len(string)
                yield string

        while True:
            number = min(range(len(read)), key=lambda i: (read[i] / self._weights[i], i))
            document = next(streams[number], None)
            if document is not None:
                yield counted(document, number)
                continue
            source = self.parts[number]
            if epochs[number] == self._max_epochs[number] or read[number] == begun_at[number]:
                self.ended_with = source.name if epochs[number] == 1 else f"{epochs[number]} readings of {source.name}"
                return
            self._of_first_epochs.setdefault(number, source.tallies)
            epochs[number], begun_at[number] = epochs[number] + 1, read[number]
            streams[number] = source.documents()


def _open_source(name: str, config: DataConfig) -> Source:
    how = {"text_key": config.text_key, "skip_bad": config.on_bad_record == "skip"}
    passed_by = Tally(name)
    how_files = {**how, "separator": config.document_separator}
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, Tally(name), skip=_NOT_STDLIB) if path.suffix == ".py"]
        return _LocalFiles(f"stdlib of Python {platform.python_version()}", root, files, **how_files)
    if name.startswith("hf:"):
        dataset, split, subset = (name.removeprefix("hf:").split(":", 2) + ["", ""])[:3]
        return _HubDataset(name, dataset, split or "train", subset or None, **how)
    path = Path(name).expanduser()
    if path.is_file():
        return _LocalFiles(name, path.parent, [path], **how_files, is_named=True)
    if path.is_dir():
        files, root = list(_walk(path, passed_by)), path
    elif glob.has_magic(name):
        files, root = list(_expand(str(path), passed_by)), None
    else:
        raise CocomixError(f"data.text: there is no file or folder {name}")
    files = list(_not_made_here(files, Path(config.folder).resolve(), passed_by))
    if not files:
        found = "".join(f"; it holds {found}" for found in passed_by.left_out())
        raise CocomixError(f"data.text: there are no text files in {name}{found}")
    return _LocalFiles(name, root, files, **how_files, passed_by=passed_by)


def _not_made_here(files: list[Path], made_here: Path, passed_by: Tally) -> Iterator[Path]:
    for file in files:
        if made_here in file.resolve().parents:
            passed_by.add(_MADE_HERE, file)
        else:
            yield file


def _walk(root: Path, passed_by: Tally, skip: Set[str] = frozenset()) -> Iterator[Path]:
    def refuse(error: OSError):
        raise CocomixError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        for name in sorted(names + subfolders):
            if name.startswith("."):
                passed_by.add(_HIDDEN, Path(folder, name))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in skip)
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.is_file():
                yield path
            else:
                passed_by.add(_NO_FILE, path)


def _expand(pattern: str, passed_by: Tally) -> Iterator[Path]:
    for match in sorted(glob.glob(pattern, recursive=True)):
        path = Path(match)
        if path.is_file():
            yield path
        elif path.is_dir() and "**" not in pattern:  # ** names the folders' contents as well
            yield from _walk(path, passed_by)


def file_listing(root: Path | None, files: list[Path]) -> dict:
    """Number and size of the files, and a hash of their names (relative to `root`), sizes and times."""
    digest, total = hashlib.sha256(), 0
    for path in files:
        with explain_unreadable(path):
            status = path.stat()
        digest.update(os.fsencode(os.path.relpath(path, root) if root else path))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        total += status.st_size
    return {"files": len(files), "bytes": total, "sha256_of_listing": digest.hexdigest()}


@dataclass
class _LocalFiles:
    name: str
    root: Path | None  # what the fingerprint names files relative to
    files: list[Path]
    text_key: str
    skip_bad: bool = False
    separator: str | None = None  # of documents in plain text
    is_named: bool = False  # it is one file, asked for by its own name
    passed_by: Tally = field(default_factory=lambda: Tally(""))  # what stands in the folders beside the files
    parts = ()
    ended_with = None

    def __post_init__(self):
        self.tallies = [self.passed_by]

    @property
    def plain_bytes(self) -> int | None:
        if not all(is_plainly_text(path) for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> dict:
        """Where there are files of kinds that versions before 0.2.0 left out or read otherwise, it says so: what those
        versions made of the same files is not the same."""
        also = {} if all(was_always_read(path) for path in self.files) else {FORMATS_READ: 2}
        return {"source": self.name, **file_listing(self.root, self.files), **also}

    def documents(self) -> Iterator[Iterable[str]]:
        tally = Tally(self.name, self.skip_bad)
        self.tallies = [self.passed_by, tally]
        for path in self.files:
            yield from read_documents(path, self.text_key, tally, self.is_named, self.separator)


@dataclass
class _HubDataset:
    name: str
    dataset: str
    split: str
    subset: str | None
    text_key: str
    skip_bad: bool = False
    plain_bytes: int | None = None
    parts = ()
    ended_with = None
    tallies: list[Tally] = field(default_factory=list)

    def fingerprint(self) -> dict:
        folder = Path(self.dataset)
        files = list(_walk(folder, Tally(self.name))) if folder.is_dir() else []
        return {"source": self.name, **(file_listing(folder, files) if folder.is_dir() else {})}

    def documents(self) -> Iterator[list[str]]:
        tally = Tally(self.name, self.skip_bad)
        self.tallies = [tally]
        for number, row in enumerate(self._rows()):
            if self.text_key not in row:
                raise CocomixError(
                    f"{self.name}: no column {self.text_key!r}; its columns are {', '.join(row)}; set data.text_key"
                )
            text = row[self.text_key]
            place = f"{self.name}, row {number}"
            if isinstance(text, str | None):
                yield from tally.text(text, place)
            else:
                tally.bad(place, f"column {self.text_key!r} holds {type(text).__name__}, not text; set data.text_key")

    def _rows(self) -> Iterator[dict]:
        with needs(self.name, "Hugging Face datasets", "cocomix[data]"):
            import datasets

        try:
            yield from datasets.load_dataset(self.dataset, self.subset, split=self.split, streaming=True)
        except Exception as error:  # the library and its readers have no common base exception
            raise CocomixError(f"{self.name} cannot be loaded: {error}") from error
