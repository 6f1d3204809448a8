"""Damage to one file, drawn at random: what disks, copies and hands do to bytes, and to the values in text formats."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cocomix.core.files import CHECKSUM

ATTEMPTS = 100  # of a draw that happens to change nothing
ZIP_ENDS = 1024  # bytes at both ends of a zip file, for its own entries
MARK = "DAMAGED-HERE"  # stands in the text for what its writer cannot write
DEPTH = 100_000
ODD_VALUES = {  # in words: as JSON
    "null": "null",
    "true": "true",
    "a string": '"text"',
    "an empty string": '""',
    "a list": "[1]",
    "an object": '{"a": 1}',
    "a negative number": "-1",
    "0": "0",
    "10 ** 30": "1" + 30 * "0",
    "1e999": "1e999",
    "NaN": "NaN",
    "a path upwards": '"../x"',
    f"{DEPTH:,} nested lists": DEPTH * "[" + DEPTH * "]",
    "a lone surrogate": '"\\ud800"',
}
Damage = tuple[bytes, str]  # the new content, and what was done in words


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file in a way that its format allows; its times stay. Returns in words what was done.

    The file is replaced by another of its name: other links to the old one keep what they have.
    """
    content, status = path.read_bytes(), path.stat()
    ways = [(way, 1) for way in BYTE_WAYS] + [entry for entry in TEXT_WAYS if path.suffix in FORMATS]
    [way] = draw.choices([way for way, _ in ways], [weight for _, weight in ways])
    for _ in range(ATTEMPTS):
        changed, words = way(content, path.suffix, draw)
        if changed != content:
            break
    else:
        raise ValueError(f"{path}: {words} changes nothing, {ATTEMPTS} times")
    path.unlink()
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return words


# --- bytes


def flip_bit(content: bytes, suffix: str, draw: random.Random) -> Damage:
    """One bit."""
    at, bit = _place(content, suffix, draw), draw.randrange(8)
    return _with(content, at, bytes([content[at] ^ 1 << bit])), f"bit {bit} of byte {_of(at, content)} flipped"


def overwrite(content: bytes, suffix: str, draw: random.Random) -> Damage:
    """Up to 16 bytes with random ones."""
    at, new = _place(content, suffix, draw), draw.randbytes(draw.randint(1, 16))
    new = new[: len(content) - at]
    return _with(content, at, new), f"{len(new)} random bytes written over byte {_of(at, content)}"


def zero(content: bytes, suffix: str, draw: random.Random) -> Damage:
    """A stretch."""
    at, length = _stretch(content, suffix, draw)
    return _with(content, at, bytes(length)), f"{length:,} bytes zeroed from byte {_of(at, content)} on"


def truncate(content: bytes, _suffix: str, draw: random.Random) -> Damage:
    """All from some byte on is lost."""
    length = int(draw.random() * len(content))
    return content[:length], f"cut to {length:,} of {len(content):,} bytes"


def append(content: bytes, _suffix: str, draw: random.Random) -> Damage:
    """Garbage at the end."""
    garbage = draw.randbytes(draw.choice([1, 2, draw.randint(3, 64), draw.randint(64, 4096)]))
    return content + garbage, f"{len(garbage):,} random bytes appended"


def repeat(content: bytes, suffix: str, draw: random.Random) -> Damage:
    """A stretch is there twice."""
    at, length = _stretch(content, suffix, draw)
    part = content[at : at + length]
    return content[:at] + part + content[at:], f"{length:,} bytes from byte {_of(at, content)} on repeated"


def _place(content: bytes, suffix: str, draw: random.Random) -> int:
    """A byte: of the header in half of all cases, where the format has one."""
    share, in_header = draw.random(), draw.random() < 0.5
    if not in_header:
        return int(share * len(content))
    if suffix == ".safetensors":
        return int(share * (8 + struct.unpack("<Q", content[:8])[0]))
    if suffix == ".pt":
        at = int(share * 2 * ZIP_ENDS)
        return at if at < ZIP_ENDS else len(content) - 2 * ZIP_ENDS + at
    return int(share * len(content))


def _stretch(content: bytes, suffix: str, draw: random.Random) -> tuple[int, int]:
    """Where it begins and its length: a few bytes, or much of the rest."""
    at, share = _place(content, suffix, draw), draw.random()
    longest = draw.choice([16, 512, len(content)])
    return at, 1 + int(share * (min(longest, len(content) - at) - 1))


def _with(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def _of(at: int, content: bytes) -> str:
    return f"{at:,} of {len(content):,}"


# --- values


def replace_value(content: bytes, suffix: str, draw: random.Random) -> Damage:
    """A value by one of another kind."""
    text, document, line = _document(content, suffix, draw)
    parent, key, words = _slot(document, draw)
    odd = draw.choice(list(ODD_VALUES))
    parent[key] = MARK
    changed = _written(document, suffix, {MARK: ODD_VALUES[odd]})
    return _put_back(text, line, changed), f"{_on(line)}{words} replaced by {odd}"


def delete_value(content: bytes, suffix: str, draw: random.Random) -> Damage:
    """A key with its value, or an element of a list."""
    text, document, line = _document(content, suffix, draw)
    parent, key, words = _slot(document, draw)
    if key == CHECKSUM:  # which people delete on purpose: all else is what it was
        return repeat_key(content, suffix, draw)
    del parent[key]
    return _put_back(text, line, _written(document, suffix, {})), f"{_on(line)}{words} deleted"


def repeat_key(content: bytes, suffix: str, draw: random.Random) -> Damage:
    """A key is there twice, with two values."""
    text, document, line = _document(content, suffix, draw)
    parent, key, words = _slot(document, draw, of=dict)
    odd = draw.choice(list(ODD_VALUES))
    parent[f"{MARK}-KEY"] = f"{MARK}-VALUE"
    changed = _written(document, suffix, {f"{MARK}-KEY": json.dumps(key), f"{MARK}-VALUE": ODD_VALUES[odd]})
    return _put_back(text, line, changed), f"{_on(line)}{words} given once more, with {odd}"


def lone_surrogate(content: bytes, suffix: str, draw: random.Random) -> Damage:
    """Half of a character at the end of a string, or of what else stands there."""
    text, document, line = _document(content, suffix, draw)
    parent, key, words = _slot(document, draw)
    new = json.dumps(str(parent[key]))[:-1] + '\\ud800"'
    parent[key] = MARK
    return _put_back(text, line, _written(document, suffix, {MARK: new})), f"{_on(line)}{words} ends in a surrogate"


def invalid_utf8(content: bytes, _suffix: str, draw: random.Random) -> Damage:
    """A byte that no UTF-8 text has."""
    at = int(draw.random() * len(content))
    return content[:at] + b"\xff" + content[at:], f"a byte ff put before byte {_of(at, content)}"


def _document(content: bytes, suffix: str, draw: random.Random):
    """The text, what it holds, and the number of the line where a line is all that is taken (else None)."""
    text, share = content.decode(), draw.random()
    if suffix == ".jsonl":
        lines = text.splitlines()
        line = int(share * len(lines))
        return text, json.loads(lines[line]), line
    return text, FORMATS[suffix](text), None


def _slot(document, draw: random.Random, of: type = object) -> tuple[Any, Any, str]:
    """A list or mapping somewhere in the document, a key in it, and the way there in words."""
    slots = [slot for slot in _slots(document, "") if isinstance(slot[0], of)]
    return slots[int(draw.random() * len(slots))]


def _slots(value, where: str):
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in entries:
            words = f"{where}.{key}".removeprefix(".")
            yield value, key, words
            yield from _slots(inner, words)


def _written(document, suffix: str, instead: dict[str, str]) -> str:
    """The document as text, with other text in the place of some strings."""
    if suffix == ".yaml":
        text = yaml.safe_dump(document, sort_keys=False, width=1_000_000)
        for mark, new in instead.items():
            text = text.replace(mark, new.replace("NaN", ".nan"))
        return text
    text = json.dumps(document, indent=None if suffix == ".jsonl" else 2)
    for mark, new in instead.items():
        text = text.replace(json.dumps(mark), new)
    return text


def _put_back(text: str, line: int | None, changed: str) -> bytes:
    if line is None:
        return changed.encode()
    lines = text.splitlines()
    lines[line] = changed
    return "".join(one + "\n" for one in lines).encode()


def _on(line: int | None) -> str:
    return "" if line is None else f"line {line + 1}: "


FORMATS: dict[str, Callable] = {".json": json.loads, ".jsonl": json.loads, ".yaml": yaml.safe_load}
BYTE_WAYS = (flip_bit, overwrite, zero, truncate, append, repeat)
TEXT_WAYS = ((replace_value, 6), (delete_value, 2), (repeat_key, 1), (lone_surrogate, 1), (invalid_utf8, 1))
