"""What kind of file this is, told by how it begins where its name does not say, and the documents in it."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cocomix.core.errors import CocomixError
from cocomix.data.json_records import BLANKS, LINES, VALUES, Layout, find_layout, read_json_lines, read_json_values
from cocomix.data.left_out import EMPTY, Tally
from cocomix.data.opening import PACKED_NAMES, open_unpacked
from cocomix.data.separators import split_documents
from cocomix.data.tables import read_arrow, read_parquet
from cocomix.data.text_files import encoding_of, look_through, read_text

TEXT, PARQUET, ARROW = "text", "Parquet", "Arrow"
NOT_TEXT = "not UTF-8 text"
UNDECODABLE = "text with undecodable bytes, read as U+FFFD"
NULS = "text with NUL characters, kept"
_START_BYTES = 1 << 18  # of a file, that tell what it is
_JSON_LINES_NAMES = (".jsonl", ".ndjson")
_TABLE_NAMES = {".parquet": PARQUET, ".arrow": ARROW}
_TABLE_STARTS = {b"PAR1\x15": PARQUET, b"ARROW1\0\0": ARROW, b"\xff\xff\xff\xff": ARROW}
_FOREIGN_STARTS = {
    b"PK\x03\x04": "zip archive",
    b"7z\xbc\xaf\x27\x1c": "7z archive",
    b"Rar!\x1a": "rar archive",
    b"\x04\x22\x4d\x18": "lz4 archive",
    b"WARC/": "WARC archive",
    b"%PDF-": "PDF",
    b"\x89PNG": "image",
    b"\xff\xd8\xff": "image",
    b"GIF87a": "image",
    b"GIF89a": "image",
}
_TAR_MARK = slice(257, 262)  # "ustar"
_DATASET_NOTES = ("dataset_info.json", "state.json", "dataset_dict.json")  # of datasets, beside its Arrow files


@dataclass(frozen=True)
class Kind:
    """What a file holds: `TEXT`, `PARQUET`, `ARROW`, `LINES` or `VALUES` of JSON; or else, and why it is not read."""

    name: str
    encoding: str = "utf-8"
    is_read: bool = True


def unpacked_name(path: Path) -> str:
    """The name of a file in small letters, without what says how it is packed."""
    name = path.name.lower()
    packed = next((ending for ending in PACKED_NAMES if name.endswith(ending)), "")
    return name.removesuffix(packed)


def is_plainly_text(path: Path) -> bool:
    """Whether the name of a file rules out that it is packed or holds records."""
    name, suffix = unpacked_name(path), Path(unpacked_name(path)).suffix
    return name == path.name.lower() and suffix not in (*_JSON_LINES_NAMES, *_TABLE_NAMES, ".json")


def was_always_read(path: Path) -> bool:
    """Whether versions before 0.2.0 read or left out a file of this name as this one does, as far as names say."""
    return is_plainly_text(path) or path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".parquet"))


def kind_of(path: Path, text_key: str) -> Kind:
    """Look at the name and the start of a file. Raises `CocomixError` for one that cannot be read."""
    with open_unpacked(path) as file:
        start = file.read(_START_BYTES)
    suffix = Path(unpacked_name(path)).suffix
    table = _TABLE_NAMES.get(suffix) or _starting(start, _TABLE_STARTS)
    if table:
        return Kind(table)
    if start[_TAR_MARK] == b"ustar":
        return Kind("tar archive", is_read=False)
    if foreign := _starting(start, _FOREIGN_STARTS):
        return Kind(foreign, is_read=False)
    return _kind_of_text(path, suffix, start, text_key)


def _starting(start: bytes, kinds: dict[bytes, str]) -> str | None:
    return next((kind for mark, kind in kinds.items() if start.startswith(mark)), None)


def _kind_of_text(path: Path, suffix: str, start: bytes, text_key: str) -> Kind:
    encoding = encoding_of(start)
    says_text = suffix[1:].isalpha() and suffix not in (*_JSON_LINES_NAMES, ".json")
    if says_text:
        return Kind(TEXT, encoding)
    text = start.decode(encoding, "replace")
    layout = find_layout(text, len(start) < _START_BYTES, text_key)
    if suffix in _JSON_LINES_NAMES:
        return Kind(VALUES if layout and _lies_on_no_lines(layout, text) else LINES, encoding)
    if layout is None or (suffix != ".json" and not _has_field(layout, text, text_key)):
        return Kind(TEXT, encoding)
    if layout.has_field is False or _is_note_of_dataset(path):
        return Kind(f"JSON without the field {text_key!r}", is_read=False)
    return Kind(layout.name, encoding)


def _lies_on_no_lines(layout: Layout, start: str) -> bool:
    """Whether a file that is called JSON lines is something else: then only a damaged line is no record."""
    is_array = start.lstrip(BLANKS).startswith("[") and layout.has_field is None
    return layout.name == VALUES and (bool(layout.has_field) or is_array)


def _has_field(layout: Layout, start: str, text_key: str) -> bool:
    if layout.has_field is None:  # the first record goes on behind the start
        return json.dumps(text_key, ensure_ascii=False) in start
    return layout.has_field


def _is_note_of_dataset(path: Path) -> bool:
    return path.name in _DATASET_NOTES and any(path.parent.glob("**/*.arrow"))


def read_documents(
    path: Path, text_key: str, tally: Tally, is_named: bool, separator: str | None = None
) -> Iterator[Iterable[str]]:
    """Every document of a file; in plain text a `separator` ends them. A file that is not read is counted, or raises
    `CocomixError` if `is_named`, that is, if it was asked for by its own name; so do bad records that are not to be
    skipped."""
    kind = kind_of(path, text_key)
    if kind.name == PARQUET:
        yield from read_parquet(path, text_key, tally)
    elif kind.name == ARROW:
        yield from read_arrow(path, text_key, tally)
    elif kind.name == LINES:
        yield from read_json_lines(path, kind.encoding, text_key, tally)
    elif kind.name == VALUES:
        yield from read_json_values(path, kind.encoding, text_key, tally)
    else:
        reason = _text_problem(path, kind, tally) if kind.is_read else kind.name
        if reason is None:
            yield from _texts_of(path, kind.encoding, tally, separator)
        elif not is_named:
            tally.add(reason, path)
        else:
            raise CocomixError(_refusal(path, reason))


def _refusal(path: Path, reason: str) -> str:
    if reason.startswith("JSON"):
        return f"{path} holds {reason}; set data.text_key"
    what = f"{path} is {reason}" if reason == NOT_TEXT else f"{path}: no kind of file that is read ({reason})"
    return f"{what}: convert it, or take it out of data.text"


def _text_problem(path: Path, kind: Kind, tally: Tally) -> str | None:
    """Why a file is no text; what is strange in one that is, is counted."""
    strange = look_through(path, kind.encoding)
    if not strange.is_text:
        return NOT_TEXT
    for reason, count in ((UNDECODABLE, strange.undecodable), (NULS, strange.nuls)):
        if count:
            tally.add(reason, f"{path}: {count:,}")
    return None


def _texts_of(path: Path, encoding: str, tally: Tally, separator: str | None) -> Iterator[Iterator[str]]:
    text = read_text(path, encoding)
    if separator is None:
        yield _counted(text, path, tally)
        return
    for number, document in enumerate(split_documents(text, separator), start=1):
        yield _counted(document, f"{path}, document {number}", tally)


def _counted(texts: Iterator[str], name: object, tally: Tally) -> Iterator[str]:
    is_empty = True
    for text in texts:
        is_empty = is_empty and not text.strip()
        yield text
    if is_empty:
        tally.add(EMPTY, name)
