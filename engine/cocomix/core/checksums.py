"""Checksums of what lies on disk: CRC-32, which catches every run of up to 32 wrong bits, and one in four billion of
longer ones slips through. zlib has it for every processor, at 1 to 7 GB/s a core.

Files that are read here and there have one for each block (see `block_sums`). Files that are read whole have one each,
in the manifest of their folder. JSON files and lines carry their own.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 22


def of_file(path: str | os.PathLike[str]) -> str:
    """The checksum of a file, eight hexadecimal digits."""
    value = 0
    with open(path, "rb") as file:
        while content := file.read(_READ_BYTES):
            value = zlib.crc32(content, value)
    return _in_hexadecimal(value)


def of_value(value: Any) -> str:
    """The checksum of a JSON value, whatever the order of its keys, eight hexadecimal digits."""
    return of_parsed(json.loads(json.dumps(value)))  # in which keys are strings and tuples are lists


def of_parsed(value: Any) -> str:
    """As `of_value`, of a value that has just been read from JSON."""
    return _in_hexadecimal(zlib.crc32(json.dumps(value, sort_keys=True).encode()))


def of_array(label: str, array: memoryview) -> str:
    """The checksum of an array's bytes and of the label that says what they are, eight hexadecimal digits."""
    return _in_hexadecimal(zlib.crc32(array, zlib.crc32(label.encode())))


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those below it, sorted."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _in_hexadecimal(value: int) -> str:
    return f"{value:08x}"
