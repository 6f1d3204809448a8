"""Plain text: its encoding, what of it cannot be decoded, and its characters block by block."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from cocomix.data.opening import open_unpacked

BLOCK_BYTES = 1 << 17  # that are decoded at a time
MAX_STRANGE_SHARE = 0.01  # of a text's characters that no text has
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def encoding_of(start: bytes) -> str:
    """The encoding of a text that starts so, which is UTF-8 unless a byte order mark names another."""
    return next((name for mark, name in _BOMS.items() if start.startswith(mark)), "utf-8")


def blocks(file: IO[bytes], encoding: str, errors: str) -> Iterator[str]:
    """The characters of a file as they are read, line ends untouched."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    while block := file.read(BLOCK_BYTES):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


class Strange(NamedTuple):
    """How much of a text of `chars` characters cannot be decoded, and how many of them are NUL."""

    undecodable: int
    nuls: int
    chars: int

    @property
    def is_text(self) -> bool:
        """Whether the rest is enough for a text: photographs and programs have far more of them."""
        return self.undecodable + self.nuls <= MAX_STRANGE_SHARE * self.chars


def look_through(path: Path, encoding: str) -> Strange:
    """Read a file to its end and count. Raises `CocomixError` for one that cannot be read."""
    replacing, ignoring = (codecs.getincrementaldecoder(encoding)(errors) for errors in ("replace", "ignore"))
    undecodable = nuls = chars = 0
    with open_unpacked(path) as file:
        final = False
        while not final:
            block = file.read(BLOCK_BYTES)
            final, before = not block, replacing.getstate()
            text = replacing.decode(block, final)
            nuls, chars = nuls + text.count("\0"), chars + len(text)
            if "\ufffd" in text:  # a text may hold some of its own
                ignoring.setstate(before)
                undecodable += text.count("\ufffd") - ignoring.decode(block, final).count("\ufffd")
    return Strange(undecodable, nuls, chars)


def read_text(path: Path, encoding: str) -> Iterator[str]:
    """The characters of a file, with U+FFFD for what cannot be decoded."""
    with open_unpacked(path) as file:
        yield from blocks(file, encoding, "replace")


def as_utf8(file: IO[bytes], encoding: str) -> IO[bytes]:
    """The same text in UTF-8; reading raises `UnicodeError` where it cannot be decoded. What is UTF-8 already is handed
    on unread."""
    if encoding.startswith("utf-8"):
        return file
    return io.BufferedReader(_Recoded(blocks(file, encoding, "strict")))


class _Recoded(io.RawIOBase):
    def __init__(self, texts: Iterator[str]):
        self._texts, self._rest = texts, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            text = next(self._texts, None)
            if text is None:
                return 0
            self._rest = text.encode()
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
