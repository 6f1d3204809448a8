"""Records in JSON: one a line, or one after another, in an array or not, over as many lines as they like."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from cocomix.core.errors import CocomixError
from cocomix.core.output import encodable
from cocomix.data.left_out import Tally
from cocomix.data.opening import open_unpacked
from cocomix.data.text_files import as_utf8, blocks

LINES, VALUES = "JSON lines", "JSON values"
_RECORD_BYTES = 1 << 27  # of a record; characters, where it is no line
BLANKS = "\ufeff \t\r\n"
_STRUCTURE = re.compile(r'["\[\]{},]')
_WITHIN_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)


class Layout(NamedTuple):
    """How records lie in a file, `LINES` or `VALUES`, and whether they have the field of the text: None where the start
    holds no whole record, so that it may follow."""

    name: str
    has_field: bool | None


def find_layout(start: str, is_whole: bool, text_key: str) -> Layout | None:
    """The layout of a file that starts so (all of it, if `is_whole`); None where this does not look like JSON."""
    begun = start.lstrip(BLANKS)
    if not begun.startswith(("{", "[")):
        return None
    lines = begun.split("\n") if is_whole else begun.split("\n")[:-1]
    if begun[0] == "{":
        records = [record for line in lines if line.startswith("{") and isinstance(record := _parsed(line), dict)]
        if records or not lines:
            return Layout(LINES, _has_field(records, text_key))
    return Layout(VALUES, _has_field([_parsed(value) for value in _whole_values(begun)], text_key))


def _has_field(records: list[Any], text_key: str) -> bool | None:
    return any(isinstance(record, dict) and text_key in record for record in records) if records else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _whole_values(start: str) -> list[str]:
    values: list[str] = []
    with contextlib.suppress(CocomixError):  # the last one goes on behind the start
        for value in split_values([start], ""):
            values.append(value)
    return values


def read_json_lines(path: Path, encoding: str, text_key: str, tally: Tally) -> Iterator[list[str]]:
    """The text of every line's record. Raises `CocomixError` for a bad record that is not to be skipped, and for a line
    that is too long."""
    with open_unpacked(path) as file:
        for number, line in enumerate(_lines(as_utf8(file, encoding), path), start=1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig")
                if not text.strip():
                    continue
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                tally.bad(place, f"not JSON: {error}")
                continue
            yield from _text_of(record, text_key, place, tally)


def read_json_values(path: Path, encoding: str, text_key: str, tally: Tally) -> Iterator[list[str]]:
    """The text of every record, in an array or one after another. Raises `CocomixError` as `read_json_lines` does, and
    for a record without an end: what follows cannot be told from it."""
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    with open_unpacked(path) as file:
        for number, value in enumerate(split_values(blocks(file, encoding, errors), str(path)), start=1):
            place = f"{path}, record {number}"
            try:
                record = json.loads(value) if encodable(value) else None
            except (ValueError, RecursionError) as error:
                tally.bad(place, f"not JSON: {error}")
                continue
            if record is None and value != "null":
                tally.bad(place, "not JSON: not UTF-8")
                continue
            yield from _text_of(record, text_key, place, tally)


def _text_of(record: Any, text_key: str, place: str, tally: Tally) -> list[list[str]]:
    """The document of a record: none where its text is null or blank, or where it is bad."""
    if isinstance(record, dict) and text_key in record and isinstance(record[text_key], str | None):
        return tally.text(record[text_key], place)
    found = f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is not an object"
    tally.bad(place, f"no text in the field {text_key!r}; {found}; set data.text_key")
    return []


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Lines of bounded length: a small compressed file can hold one that no memory does."""
    number = 0
    while line := file.readline(_RECORD_BYTES + 1):
        number += 1
        if len(line) > _RECORD_BYTES:
            raise CocomixError(f"{path}, line {number}: {_too_long()}; a record is a line: split it")
        yield line


def _too_long() -> str:
    return f"longer than {_RECORD_BYTES / 2**20:,.0f} MiB"


def split_values(texts: Iterable[str], name: str) -> Iterator[str]:
    """The values in an array, or one after another without one, as they are written, however the text is cut.

    Raises `CocomixError`, naming the file, for a value without an end, a longer one than memory should hold, and text
    after an array.
    """
    cutter = _Cutter(name)
    for text in texts:
        yield from cutter.cut(text)
    cutter.end()


class _Cutter:
    """Finds where values end, by brackets and quotes alone: what is within them is left to others."""

    def __init__(self, name: str):
        self._name, self._number = name, 0
        self._floor: int | None = None  # the depth at which values lie, 1 in an array; None: nothing has come yet
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self._array_has_ended = False
        self._held: list[str] = []  # of a value whose end has not come
        self._held_chars = 0

    def cut(self, text: str) -> Iterator[str]:
        """The values that end in `text`, which follows what came before."""
        text = self._enter(text)
        start = at = 0
        while (found := self._next_mark(text, at)) is not None:
            at = found + 1
            if self._ends_value(text[found]):
                self._hold(text[start : found if self._floor else at])
                start = at
                yield from self._release(text[found])
        self._hold(text[start:])

    def end(self) -> None:
        """Nothing follows."""
        rest = "".join(self._held).strip()
        if self._array_has_ended and rest:
            raise CocomixError(f"{self._name}: there is something behind the end of its array: take it out")
        if rest or (self._floor and not self._array_has_ended):
            raise CocomixError(
                f"{self._name}, record {self._number + 1}: it has no end; the file is cut short, or a bracket or a "
                "quote is missing: mend it"
            )

    def _enter(self, text: str) -> str:
        """What is left of `text` behind the bracket that opens the array, if there is one."""
        if self._floor is not None:
            return text
        begun = text.lstrip(BLANKS)
        if not begun:
            return ""
        self._floor = self._depth = int(begun[0] == "[")
        return begun[self._floor :]

    def _next_mark(self, text: str, at: int) -> int | None:
        """Where the next bracket or comma outside of strings is."""
        while True:
            if self._in_string:
                at = self._behind_string(text, at)
            found = None if self._in_string else _STRUCTURE.search(text, at)
            if found is None or found[0] != '"':
                return found and found.start()
            self._in_string, at = True, found.end()

    def _behind_string(self, text: str, at: int) -> int:
        if self._is_escaped and text:
            self._is_escaped, at = False, at + 1
        inside = _WITHIN_STRING.match(text, at)
        end = len(text) if inside is None else inside.end()
        if end < len(text):
            self._in_string, self._is_escaped = text[end] != '"', text[end] != '"'  # a last backslash, or the end
        return end + 1

    def _ends_value(self, mark: str) -> bool:
        if mark in "[{":
            self._depth += 1
        elif mark in "]}":
            self._depth = max(self._depth - 1, 0)
        return self._depth == 1 if mark == "," and self._floor else mark in "]}" and self._depth == 0

    def _release(self, mark: str) -> Iterator[str]:
        """The value that has ended; in an array none where it was the first and nothing came."""
        value = "".join(self._held).strip()
        self._held, self._held_chars = [], 0
        if self._array_has_ended:
            raise CocomixError(f"{self._name}: there is something behind the end of its array: take it out")
        self._array_has_ended = bool(self._floor) and mark != ","
        if value or self._number or not self._array_has_ended:
            self._number += 1
            yield value

    def _hold(self, text: str) -> None:
        self._held.append(text)
        self._held_chars += len(text)
        if self._held_chars > _RECORD_BYTES:
            raise CocomixError(f"{self._name}, record {self._number + 1}: {_too_long()}: split it")
